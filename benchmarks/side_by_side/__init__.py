"""How benchmarks/throughput.py measures: cases, processes, interleaved turns, numbers, tables. Who is measured is in
contenders/."""
