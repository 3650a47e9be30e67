"""Copies of artifacts on a device. An interrupted copy can resume. Copies are verified and kept in a cache of limited size.

The cache folder has `artifacts/KEY/`, complete and verified; `partial/KEY/`, incomplete (SHA256 is a finished file,
SHA256.part an unfinished one); and `locks/`. KEY is the sha256 of the names and sha256s of an artifact's files. Only files
below `artifacts` are run, and a folder appears there by one rename. All scripts start in the cache folder, "$1".
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmc.console import progress, say, size, warn
from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.gguf_check import PART, parts
from llmc.runtimes.targets.shell import Shell, failure, run

BLOCK = 1 << 20
BUSY, MOVED, DAMAGED, SHORT = 75, 76, 77, 78  # exit codes of the scripts below

ROOT = """
case $1 in "~") d=$HOME;; "~/"*) d=$HOME/${1#"~/"};; /*) d=$1;; *) d=$HOME/$1;; esac
umask 077; mkdir -p "$d/artifacts" "$d/partial" "$d/locks" && cd "$d" && pwd -P
"""
# If two llmc copy the same artifact, one waits, at most 20 s: the other may be the rest of a copy that was killed.
# Not every system has flock (macOS has not); length and sha256 are verified without it too.
LOCKED = """
cd "$1" || exit; umask 077
sum() { if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -c1-64; }
length() { echo $(($(wc -c <"$1"))); }
work="partial/$2"
{
if command -v flock >/dev/null; then
  n=0; until flock -n 9; do n=$((n+1)); [ $n -le 20 ] || exit 75; sleep 1; done
fi
BODY
} 9>>"locks/$2"
"""
# Prints "SHA256 done" of each finished file, "SHA256 LENGTH DIGEST" of each part.
STATE = LOCKED.replace("BODY", """
mkdir -p "$work"
for f in $(ls "$work"); do
  case $f in
    *.part) echo "${f%.part} $(length "$work/$f") $(sum "$work/$f")";;
    *) echo "$f done";;
  esac
done
""")
# Appends stdin at offset "$4" of the part of "$3"; a file of length "$5" is then checked, and finished.
APPEND = LOCKED.replace("BODY", """
part="$work/$3.part"
if [ "$4" = 0 ]; then : >"$part"; fi
[ "$(length "$part")" = "$4" ] || exit 76
cat >>"$part" || exit
[ "$(length "$part")" = "$5" ] || exit 78
if [ "$(sum "$part")" != "$3" ]; then rm -f "$part"; exit 77; fi
{ sync "$part" 2>/dev/null || sync; } && mv "$part" "$work/$3"
""")
# Gives the finished files their names ("$3" a sha256, "$4" its name, and so on) in a folder that is then renamed as a whole.
PUBLISH = LOCKED.replace("BODY", """
if [ -e "artifacts/$2" ]; then exit; fi
key=$2; shift 2; rm -rf "$work/files"
while [ $# -gt 0 ]; do
  f="$work/files/$2"; mkdir -p "${f%/*}" && { ln "$work/$1" "$f" 2>/dev/null || cp "$work/$1" "$f"; } || exit; shift 2
done
mv "$work/files" "artifacts/$key" && rm -rf "$work"
""")
USE = 'cd "$1" && [ -d "artifacts/$2" ] && touch "artifacts/$2"'
# Reads keys from stdin and holds a shared lock on each until stdin ends; each level of the recursion holds one.
HOLD = """
cd "$1" || exit; umask 077
hold() {
  read -r key || exit 0
  { if command -v flock >/dev/null; then flock -s 9 || exit; fi; echo "$key"; hold; } 9>>"locks/$key.use"
}
hold
"""
LIST = """
cd "$1" || exit; rm -rf trash-*
for d in $(ls -td artifacts/* partial/* 2>/dev/null); do
  if [ -d "$d" ]; then echo "$d $(du -sk "$d" | cut -f1)"; fi
done
df -kP . | tail -n 1
"""
# Without flock the script cannot know whether an entry is in use: then it removes nothing that was used within a day.
REMOVE = """
cd "$1" || exit; umask 077
{
if command -v flock >/dev/null; then flock -n 9 || exit 75
elif [ -z "$(find "$2/$3" -prune -mtime +0)" ]; then exit 75; fi
mv "$2/$3" "trash-$3" && rm -rf "trash-$3" "locks/$3"
} 9>>"locks/$3.use"
"""


@dataclass(frozen=True)
class File:
    """One file of an artifact. name: its relative POSIX path on the device; path: its path on this machine."""

    name: str
    path: Path
    sha256: str
    size: int


def files_of(artifact: Path) -> list[File]:
    """The files of an artifact (a file or a folder), sorted by name. A later change is found when the copy is verified."""
    paths = _of_file(artifact) if artifact.is_file() else sorted(p for p in artifact.rglob("*") if p.is_file())
    if not paths:
        raise UserError(f"{artifact} is neither a file nor a folder with files",
                        "give a .gguf file or a folder that `llmc export` wrote")
    base = artifact.parent if artifact.is_file() else artifact
    return [File(p.relative_to(base).as_posix(), p, sha256(p), p.stat().st_size) for p in paths]


def _of_file(artifact: Path) -> list[Path]:
    """The file; all parts, if its name is that of a part of a split .gguf file. The runtime there checks what is in it."""
    return parts(artifact) if PART.fullmatch(artifact.name) else [artifact]


def key_of(files: list[File]) -> str:
    return hashlib.sha256(json.dumps([[f.name, f.sha256] for f in files]).encode()).hexdigest()


class Cache:
    """The cache folder of a device. root: the path in the target ('~/' is the device's home); cap: its limit in bytes."""

    def __init__(self, shell: Shell, root: str, cap: int) -> None:
        self.shell, self.cap = shell, cap
        self.root = run(shell, ROOT, root)[1].removesuffix("\n")
        self._holder: subprocess.Popen[bytes] | None = None

    def place(self, artifact: Path) -> str:
        """The artifact's path on the device. It is copied there first if needed, and is not removed before `close`."""
        files = files_of(artifact)
        key = key_of(files)
        self._hold(key)
        if run(self.shell, USE, self.root, key, expect=(1,))[0]:
            self.make_room(sum(f.size for f in files), key, artifact.name)
            self._send(key, files)
            run(self.shell, PUBLISH, self.root, key, *(text for f in files for text in (f.sha256, f.name)))
        return f"{self.root}/artifacts/{key}" + (f"/{files[0].name}" if artifact.is_file() else "")

    def _send(self, key: str, files: list[File]) -> None:
        """Send the files, or parts of files, that are missing there. Raises UserError if a file arrives damaged twice."""
        code, out = run(self.shell, STATE, self.root, key, expect=(BUSY,))
        self._check(code, b"", files[0])
        there = {name: what for name, *what in (line.split() for line in out.splitlines())}
        for file in {f.sha256: f for f in files}.values():
            state = there.get(file.sha256, ["0", ""])
            if state == ["done"]:
                continue
            if not self._append(key, file, self._verified(file, int(state[0]), state[1])):
                warn(f"{file.name} arrived damaged on {self.shell.name}: sending it again")
                if not self._append(key, file, 0):
                    raise UserError(f"{file.name} arrived damaged on {self.shell.name} twice",
                                    "check the device's disk and memory; was the file being written here meanwhile?")

    def _verified(self, file: File, length: int, digest: str) -> int:
        """The bytes of a part that can stay: all of them if it is the beginning of the file, else 0."""
        if length == 0:
            return 0
        if length <= file.size and _sha256_of_first(file.path, length) == digest:
            say(f"going on with {file.name} on {self.shell.name} at {size(length)} of {size(file.size)}")
            return length
        warn(f"what {self.shell.name} has of {file.name} is damaged: sending it from the start")
        return 0

    def _append(self, key: str, file: File, offset: int) -> bool:
        """Send the rest of a file; return False if the complete file on the device differs from this machine's."""
        process = self.shell.popen(APPEND, self.root, key, file.sha256, str(offset), str(file.size),
                                   stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stdin is not None
        with file.path.open("rb") as f, progress(f"copying {file.name} to {self.shell.name}, MB", file.size // 1_000_000,
                                                 offset // 1_000_000) as p:
            f.seek(offset)
            try:
                for n in _pump(f, process.stdin):
                    if n // 1_000_000 > p.done - offset // 1_000_000:
                        p.step(n=n // 1_000_000 - (p.done - offset // 1_000_000))
                process.stdin.close()
            except BrokenPipeError:
                pass  # the exit code and stderr have the reason
            finally:
                process.stdin = None  # communicate() would flush it
                err = process.communicate()[1]
        self._check(process.returncode, err, file)
        return process.returncode == 0

    def _check(self, code: int, err: bytes, file: File) -> None:
        if code in (BUSY, MOVED):
            raise UserError(f"another llmc is copying {file.name} to {self.shell.name} now", "try again when it is done")
        if code == SHORT:
            raise UserError(f"the copy of {file.name} to {self.shell.name} was cut short", "run it again: the copy goes on")
        if code not in (0, DAMAGED):
            raise failure(self.shell, code, err)

    def _hold(self, key: str) -> None:
        """Lock an artifact, so that no other process removes it while this connection exists."""
        if self._holder is None:
            self._holder = self.shell.popen(HOLD, self.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        with suppress(BrokenPipeError):  # the missing answer raises the error below
            self._holder.stdin.write(key.encode() + b"\n")
        if self._holder.stdout.readline().strip() != key.encode():
            raise failure(self.shell, self._holder.wait(), b"")

    def entries(self) -> tuple[list[tuple[str, str, int]], int]:
        """([('artifacts' or 'partial', key, bytes)], the newest use first; bytes free on the device's disk)."""
        *lines, disk = run(self.shell, LIST, self.root)[1].splitlines()
        found = []
        for line in lines:
            path, kilobytes = line.split()
            kind, key = path.split("/")
            found.append((kind, key, int(kilobytes) * 1024))
        free = re.search(r"(\d+) +\d+% ", disk)
        assert free is not None, disk
        return found, int(free[1]) * 1024

    def make_room(self, needed: int, key: str, name: str) -> None:
        """Remove the least recently used entries that are not in use, until `needed` more bytes fit the cap and the disk."""
        entries, free = self.entries()
        there = sum(n for _, k, n in entries if k == key)
        used = sum(n for _, k, n in entries if k != key)
        for kind, k, n in reversed(entries):
            if used + needed <= self.cap and needed - there <= free:
                break
            if k != key and self.remove(kind, k):
                say(f"removed an artifact of {size(n)} from the cache of {self.shell.name}")
                used, free = used - n, free + n
        if used + needed > self.cap:
            raise UserError(f"{name} has {size(needed)}, and the cache of {self.shell.name} may hold {size(self.cap)}, of "
                            f"which {size(used)} are in use", "raise cache_gb of that target in targets.toml")
        if needed - there > free:
            raise UserError(f"{name} needs {size(needed - there)} on {self.shell.name}, whose disk has {size(free)} free",
                            "free some space there, or give the target another cache folder")

    def remove(self, kind: str, key: str) -> bool:
        """Remove one entry; return False if it is in use."""
        return run(self.shell, REMOVE, self.root, kind, key, expect=(BUSY,))[0] == 0

    def clean(self) -> tuple[int, int]:
        """Remove every entry that is not in use: (bytes removed, bytes left)."""
        removed = left = 0
        for kind, key, n in self.entries()[0]:
            if self.remove(kind, key):
                removed += n
            else:
                left += n
        return removed, left

    def close(self) -> None:
        """Release the locks of this connection."""
        if self._holder is not None:
            self._holder.communicate()
            self._holder = None


def _pump(source: IO[bytes], sink: IO[bytes]) -> Iterator[int]:
    """Copy the rest of `source`; yield the number of copied bytes after each block."""
    total = 0
    while block := source.read(BLOCK):
        sink.write(block)
        total += len(block)
        yield total


def _sha256_of_first(path: Path, length: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while length and (block := f.read(min(length, BLOCK))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
