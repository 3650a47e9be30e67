"""The `__main__.py` of the zip that runs on a device. The first line of stdin names the module to run and its job.

The job comes through stdin because an argument of a command line is limited (128 KiB on Linux), and token ids can be many.
The module reads the following lines.
"""

import json
import runpy
import sys

OLDEST = (3, 11)


def main() -> None:
    if sys.version_info < OLDEST:
        here = ".".join(map(str, sys.version_info[:3]))
        print(json.dumps({"problem": "the device's Python is %s, llmc needs 3.11 or newer there" % here,  # noqa: UP031
                          "hint": "install a newer Python there and set python = \"/path/to/python3\" in targets.toml"}))
        sys.exit(2)
    order = json.loads(sys.stdin.buffer.readline())
    sys.argv = [order["module"], json.dumps(order["job"])]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
