"""Print the table of edge cases: what each OHEM implementation does where most of them break."""

import mmseg.models  # noqa: F401

from ohem_mm.bench.edge_cases import table

if __name__ == "__main__":
    print(table())
