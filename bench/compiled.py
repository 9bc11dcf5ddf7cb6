"""python -m bench.compiled: the table of meters/compiled.py, which see."""

from bench.meters.compiled import main

if __name__ == "__main__":
    raise SystemExit(main())
