"""`llmc target setup` of emulated-arm64: it makes a Debian tree for ARM with Python and the runtimes, without root.

apt downloads the packages into a separate folder, so this system does not change. pip downloads the wheels for aarch64. The
cross compiler builds llama-cpp-python for ARM, with the same version of llama.cpp that runs here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.console import say
from llmc.errors import UserError
from llmc.files import staged_folder
from llmc.locks import locked
from llmc.runtimes.targets.emulated import DEBIAN, SITE, command, environment, find_python, find_qemu, tree_of
from llmc.runtimes.targets.target import Target

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
GCC, GXX = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"
ARCH = "armv8.2-a+dotprod+i8mm"  # the target of llama.cpp's build: it has the int8 kernels of current phones
WHEELS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
CMAKE = (f"-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER={GCC} -DCMAKE_CXX_COMPILER={GXX} "
         f"-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH={ARCH} -DLLAVA_BUILD=OFF")
# (name in /proc/cpuinfo, word, bit) of AT_HWCAP and AT_HWCAP2; see arch/arm64/include/uapi/asm/hwcap.h of Linux
HWCAPS = (("fp", 0, 0), ("asimd", 0, 1), ("aes", 0, 3), ("pmull", 0, 4), ("sha1", 0, 5), ("sha2", 0, 6), ("crc32", 0, 7),
          ("atomics", 0, 8), ("fphp", 0, 9), ("asimdhp", 0, 10), ("cpuid", 0, 11), ("asimdrdm", 0, 12), ("asimddp", 0, 20),
          ("sve", 0, 22), ("asimdfhm", 0, 23), ("sve2", 1, 1), ("i8mm", 1, 13), ("bf16", 1, 14))
READ_HWCAPS = "import ctypes; f = ctypes.CDLL(None).getauxval; f.restype = ctypes.c_ulong; print(f(16), f(26))"
PURE = ("diskcache", "jinja2", "typing_extensions")  # llama-cpp-python's imports besides numpy


def missing(compiles: bool) -> list[str]:
    """The programs that the setup needs and this machine lacks."""
    needed = ["apt-get", "dpkg-deb", *([GCC, GXX] if compiles else [])]
    return [p for p in needed if shutil.which(p) is None] + ([] if find_qemu() else ["qemu-aarch64-static"])


def install(target: Target, packages: list[str]) -> Path:
    """Make the tree with these pip packages; return its folder. It takes some minutes, most of them to compile."""
    llama = [p for p in packages if p.startswith("llama-cpp-python")]
    if absent := missing(bool(llama)):
        raise UserError(f"{target.name}: this machine lacks {', '.join(absent)}", f"on Debian: {DEBIAN}")
    tree = tree_of(target)
    with locked(tree), staged_folder(tree) as work:
        say("getting Python for ARM from Debian")
        _debian(work)
        python = find_python(work)
        if python is None:
            raise UserError(f"Debian's packages {', '.join(PACKAGES)} contain no Python", "see the messages above")
        version = python.name.removeprefix("python")
        say(f"getting wheels for aarch64 and Python {version}")
        _pip(work, "--only-binary=:all:", "--implementation=cp", f"--python-version={version}",
             *(f"--platform={p}" for p in WHEELS), *(p for p in packages if p not in llama), *(PURE if llama else ()))
        if llama:
            say(f"compiling {llama[0]} for {ARCH}: some minutes")
            # with its cache, pip would later install this wheel on this machine
            _pip(work, "--no-cache-dir", "--no-deps", "--no-binary=llama-cpp-python", *llama, CMAKE_ARGS=CMAKE)
        qemu = find_qemu()
        assert qemu is not None
        _cpuinfo(work, qemu)
        _run([*command(qemu, work, "-c", "import numpy")], "the tree's Python does not run", env=environment(work))
    return tree


def _debian(tree: Path) -> None:
    """Unpack the arm64 packages and their dependencies into a folder, with a temporary state of apt."""
    with tempfile.TemporaryDirectory(prefix="llmc-apt-") as folder:
        apt = Path(folder)
        for name in ("state/lists/partial", "cache/archives/partial"):
            (apt / name).mkdir(parents=True)
        (apt / "status").touch()
        options = {"APT::Architecture": "arm64", "APT::Architectures::": "arm64", "APT::Install-Recommends": "0",
                   "Dir::State": apt / "state", "Dir::Cache": apt / "cache", "Dir::State::status": apt / "status",
                   "Debug::NoLocking": "1", "APT::Sandbox::User": _user()}
        get = ["apt-get", "-q", "-y", *(f"-o{k}={v}" for k, v in options.items())]
        _run([*get, "update"], "apt-get cannot read Debian's list of packages")
        _run([*get, "install", "--download-only", *PACKAGES], "apt-get cannot get Python for ARM")
        for deb in sorted((apt / "cache/archives").glob("*.deb")):
            _run(["dpkg-deb", "-x", str(deb), str(tree)], f"{deb.name} cannot be unpacked")
    if not (tree / "lib").exists():  # Debian 13 packs all into usr; the package with this link is not needed
        (tree / "lib").symlink_to("usr/lib")


def _cpuinfo(tree: Path, qemu: str) -> None:
    """Write /proc/cpuinfo of the emulated CPU. qemu before 8.1 shows this machine's, and onnxruntime crashes on that."""
    done = subprocess.run(command(qemu, tree, "-c", READ_HWCAPS), env=environment(tree), stdout=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode:
        raise UserError(f"the tree's Python does not run under {qemu}: exit code {done.returncode}", "see its messages above")
    words = [int(word) for word in done.stdout.split()]
    features = " ".join(name for name, word, bit in HWCAPS if words[word] >> bit & 1)
    cpu = (f"BogoMIPS\t: 100.00\nFeatures\t: {features}\nCPU implementer\t: 0x00\nCPU architecture: 8\nCPU variant\t: 0x0\n"
           "CPU part\t: 0x000\nCPU revision\t: 0\n\n")
    (tree / "proc").mkdir()
    (tree / "proc/cpuinfo").write_text("".join(f"processor\t: {i}\n{cpu}" for i in range(os.cpu_count() or 1)))


def _user() -> str:
    import getpass

    return getpass.getuser()


def _pip(tree: Path, *args: str, **env: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", str(tree / SITE)]
    _run([*pip, *args], "pip cannot get the packages for ARM", env={**os.environ, **env})


def _run(args: list[str], problem: str, env: dict[str, str] | None = None) -> None:
    """Run a program with its output on stderr; raise UserError with `problem` if it fails."""
    code = subprocess.run(args, env=env, stdout=sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else None,
                          stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise UserError(f"{problem}: {Path(args[0]).name} ended with exit code {code}", "see its messages above")
