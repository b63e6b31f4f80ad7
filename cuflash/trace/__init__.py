"""From a Python mod to an expression, and from the expression to text: what FlexAttention's functions are to a kernel.

expr        the expression                   arithmetic   what its operations do to numbers
operands, functions, names, symbols   what a mod computes with while it is traced, and what that means
parameters, objects, capture, reader, recording, tracer   the mod is called on symbols, and remembered
text        mods as text and back            host         mods with their values, as functions of arrays
derive      differentiates                   fold         softcap and ALiBi as part of a score_mod
strata      which part is whose: of a row's bounds, of a column, of an element
ranges, values, conditions, intervals   what is true of a whole tile; machine, machine_numpy, machine_c carry it out
c_text, emit_c, emit_numpy   tables beside each other: C text for kernels, arrays for the reference
"""
