"""From a Python mod to an expression, and from the expression to text: what FlexAttention's functions are to a kernel.

tracer      calls the mod on symbols                  -> expr
derive      differentiates
strata      which part is whose: of a row's bounds, of a column, of an element
intervals   what is true of a whole tile
emit_c, emit_numpy   tables beside each other: C text for kernels, arrays for the reference
"""
