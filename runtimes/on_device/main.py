"""The `__main__.py` of the zip that runs on a device: the first line of stdin says which module to run, with which job.

The job comes by stdin because a command line has an end (128 KiB an argument on Linux), and token ids can be many. What
follows that line is the module's.
"""

import json
import runpy
import sys

OLDEST = (3, 11)


def main() -> None:
    if sys.version_info < OLDEST:
        here = ".".join(map(str, sys.version_info[:3]))
        print(json.dumps({"problem": "the device's Python is %s, llmc needs 3.11 or newer there" % here,  # noqa: UP031
                          "hint": "install a newer one there and name it: python = \"/path/to/python3\" in targets.toml"}))
        sys.exit(2)
    order = json.loads(sys.stdin.buffer.readline())
    sys.argv = [order["module"], json.dumps(order["job"])]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
