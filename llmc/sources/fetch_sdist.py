"""Download a package's source archive from the user's package index: `python -m llmc.sources.fetch_sdist NAME VERSION FILE`.

pip has no command for this: `pip download` runs the build of a source archive to learn its metadata. So pip's own finder and
session are used here, which read the user's configuration (indexes, mirrors, find-links, proxies, certificates, keyring).
They are private functions of pip; those used here are the same from pip 21 to 26. Prints one JSON object:
{'url', 'algorithm', 'digest'}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

STRONG = ("sha256", "sha384", "sha512")  # algorithms of an index that prove something


def fetch(name: str, version: str, out: Path) -> dict[str, str]:
    """Write the source archive to `out` and check its hash. Raises RuntimeError for what the index does not have."""
    from pip._internal.commands.download import DownloadCommand
    from pip._internal.utils.misc import redact_auth_from_url

    command: Any = DownloadCommand("download", "")
    with command.main_context():
        options, _ = command.parse_args([name, "--no-deps", "--no-binary", name])
        session = command.get_default_session(options)
        candidates = command._build_package_finder(options, session).find_all_candidates(name)
        links = [c.link for c in candidates if str(c.version) == version and not c.link.is_wheel]
        if not links:
            raise RuntimeError(f"the package index has no source archive of {name} {version}")
        link = next((x for x in links if x.hash_name in STRONG), None)
        if link is None:
            raise RuntimeError(f"the package index gives no {STRONG[0]} for the source archive of {name} {version}")
        digest = hashlib.new(link.hash_name)
        answer = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
        answer.raise_for_status()
        with out.open("wb") as f:
            while block := answer.raw.read(1 << 20):
                digest.update(block)
                f.write(block)
        if digest.hexdigest() != link.hash:
            raise RuntimeError(f"the download of {name} {version} has another {link.hash_name} than the package index gives")
        return {"url": redact_auth_from_url(link.url_without_fragment), "algorithm": link.hash_name, "digest": link.hash}


if __name__ == "__main__":
    print(json.dumps(fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
