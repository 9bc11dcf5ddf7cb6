"""`python -m bench.compiled` prints the table of bench/meters/compiled.py."""

from bench.meters.compiled import main

if __name__ == "__main__":
    raise SystemExit(main())
