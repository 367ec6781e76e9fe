"""Counts what the attention kernels compile to, on a machine without a GPU.

    python benchmarks/kernel_table.py            print the table of docs/kernels.md
    python benchmarks/kernel_table.py --lower    also lower numbers in tests/kernel_budgets.json, where it can

Registers, spills, shared memory and the instructions of the hot loop, out of the machine code for each
architecture. They are not speed; they are what can be known without running, and where it often shows.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import compile_only
import torch

BUDGETS = Path(__file__).resolve().parent.parent / "tests" / "kernel_budgets.json"
VARIANTS = [  # architecture, causal order, with bounds
    (90, True, False),
    (90, True, True),
    (80, True, True),
    (89, True, True),
    (100, True, True),
    (120, True, True),
]
ENGINES = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "MUFU")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lower", action="store_true", help="write lower numbers to tests/kernel_budgets.json"
    )
    lower = parser.parse_args().lower
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    print("| kernel | variant | registers | shared kB | spills | in hot loop | hot loop | of which |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture, causal, bounded in VARIANTS:
        variant = compile_only.variant_name(architecture, 128, torch.bfloat16, causal, bounded)
        kernels = compile_only.attention_kernels(architecture, 128, torch.bfloat16, causal, bounded)
        for name, kernel in kernels.items():
            sass = compile_only.inspect_sass(kernel)
            hot = sass.hot_loop()
            whole, inside = (f"{counts['LDL']}/{counts['STL']}" for counts in (sass.opcodes, hot))
            engines = ", ".join(f"{hot[engine]} {engine}" for engine in ENGINES if hot[engine])
            row = (name, variant, sass.registers, sass.shared // 1024, whole, inside, hot.total(), engines)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            budget = budgets.setdefault(variant, {})
            budget[name] = min(hot.total(), budget.get(name, hot.total()))
    if lower:
        BUDGETS.write_text(json.dumps(budgets, indent=2) + "\n")


if __name__ == "__main__":
    main()
