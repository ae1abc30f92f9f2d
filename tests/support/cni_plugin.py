#!/usr/bin/python3
"""A CNI plugin for tests: notes how it was called in `log`, and does what its configuration's `do` says for a verb, or a file beside the log.

pass     (also where nothing is said) the result of the one before, or an address of its own; nothing for the other verbs
garbage  not JSON, and exit 0        silent   exit 0 without a word      error    CNI's error, exit 1
crash    words on standard error     hang     sleep with a child         again    CNI's "try again later"
empty    a result without addresses  late     CNI's error with exit 0
"""

import json
import os
import subprocess
import sys
import time

ERRORS = {
    "error": (7, "the sky fell"),
    "again": (11, "the moon is not up"),
    "late": (7, "too late"),
    "away": (50, "gone for lunch"),
}


def main() -> int:
    verb, told = os.environ["CNI_COMMAND"], json.load(sys.stdin)
    name = os.path.basename(sys.argv[0])
    if verb == "VERSION":
        versions = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] if name != "old" else ["0.3.1", "0.4.0"]
        print(json.dumps({"cniVersion": "1.0.0", "supportedVersions": versions}))
        return 0
    environment = {key: value for key, value in os.environ.items() if key.startswith("CNI_")}
    with open(told["log"], "a", encoding="utf-8") as log:
        log.write(json.dumps({"verb": verb, "plugin": name, "told": told, "environment": environment}) + "\n")
    do = told.get("do", {}).get(verb, "pass")
    try:
        with open(f"{told['log']}.{verb}", encoding="utf-8") as file:
            do = file.read().strip()
    except FileNotFoundError:
        pass
    return act(verb, told, do)


def act(verb: str, told: dict[str, object], do: str) -> int:
    """What it does."""
    result = told.get("prevResult") or {
        "cniVersion": told["cniVersion"],
        "interfaces": [{"name": os.environ.get("CNI_IFNAME"), "sandbox": os.environ.get("CNI_NETNS")}],
        "ips": [{"address": told.get("address", "192.0.2.7/24"), "interface": 0}],
    }
    if do == "garbage":
        print("segmentation fault: here be dragons")
    elif do == "empty":
        print(json.dumps({"cniVersion": told["cniVersion"]}))
    elif do == "crash":
        print("I could not find the door", file=sys.stderr)
        return 3
    elif do == "killed":
        os.kill(os.getpid(), 9)
    elif do == "hang":
        subprocess.run(["sleep", "1000"], check=False)
        time.sleep(1000)
    elif do in ERRORS:
        code, words = ERRORS[do]
        print(json.dumps({"cniVersion": told["cniVersion"], "code": code, "msg": words, "details": "so it seems"}))
        return 0 if do == "late" else 1
    elif do == "pass" and verb == "ADD":
        print(json.dumps(result))
    return 0


sys.exit(main())
