"""One call, from its arguments to its launches.

`arguments` is the record of its keywords, `mods` binds what masks and scores captured, `bind` views the arrays and
finds or has `prepare` make what the call needs, `run` allocates and launches. `checks` and the files named after it
hold the rules. `traced` is for frameworks that plan before they run; `cache` does all of this for
`flash_attn_with_kvcache`.
"""
