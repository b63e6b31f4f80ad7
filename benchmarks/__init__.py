"""The benchmarks: `cuflash bench`.

    schema     the file of results: Row, Results, write, read, and what describes the machine and the commit
    cases      what is measured: problems, with their work in FLOP and bytes
    peers      the other implementations, each behind one call
    timing     clocks, and the loop in which implementations take turns
    run        a group of cases from inputs to rows
    report     tables and plots in README.md, made from the files of results
    offline    what can be measured without a GPU

In a checkout this package lies beside `cuflash`; a wheel carries its Python files as `cuflash._benchmarks`. Commands
reach it through `cuflash.cli.bench.benchmarks(name)`.
"""
