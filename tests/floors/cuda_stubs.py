"""Empty CUDA libraries, so that a CUDA build of torch imports where its CUDA packages are not.

python cuda_stubs.py TORCH/lib OUT      (then LD_LIBRARY_PATH=OUT)

Every function in them returns an error, so that torch finds no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CUDA = re.compile(r"cu|nv|nccl")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(libraries: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    needed: set[str] = set()  # libraries
    versions: dict[str, set[str]] = defaultdict(set)  # of a library's symbols
    symbols: dict[str, set[str]] = defaultdict(set)  # by version; "" has none
    for library in libraries.glob("*.so*"):
        text = output("readelf", "-dVW", library)
        needed |= {so for so in re.findall(r"NEEDED.*\[lib(.*)\]", text) if CUDA.match(so)}
        for file, names in re.findall(r"File: lib(\S+).*\n((?:.*  Name: .*\n)+)", text):
            versions[file] |= set(re.findall(r"Name: (\S+)", names))
        for name, version in re.findall(
            r" [Uw] (\w+)(?:@(\S+))?$", output("nm", "-D", "--undefined-only", library), re.M
        ):
            symbols[version].add(name)
    plain = {name for name in symbols[""] if CUDA.match(name)}
    for so in needed:
        nodes = {version: symbols[version] for version in versions[so]}
        names = set().union(*nodes.values()) or plain
        script = out / "versions"
        script.write_text(
            "".join(
                f"{version} {{ global: {' '.join(f'{name};' for name in mine)} }};\n"
                for version, mine in nodes.items()
            )
        )
        subprocess.run(
            ["gcc", "-shared", "-w", "-fno-builtin", f"-Wl,-soname,lib{so}"]
            + ([f"-Wl,--version-script={script}"] if nodes else [])
            + ["-o", out / f"lib{so}", "-x", "c", "-"],
            input="".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(names)),
            text=True,
            check=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
