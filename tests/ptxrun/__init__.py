"""The compiled kernels without a GPU: the assembler code (PTX) that Triton made of them, executed on NumPy arrays.

Triton's interpreter runs a kernel's Python. A GPU runs what the compiler made of it: tiles spread over threads, tensor
cores, shared memory, asynchronous copies, fused multiply-adds. Here all threads of some programs of the grid run side
by side, one array a register.

- Exact, bit for bit: integers, logic, moves, shuffles, `ldmatrix` and `stmatrix`, branches.
- Rounded as on a GPU: sums, products, `fma`, conversions. A product that nothing but a sum needs becomes one `fma` with
  it, as ptxas may do.
- As inexact as a GPU may be: approximate instructions and tensor cores (`arithmetic`).
- Faults: an access to bytes that are no element of a tensor, or that another program wrote; two threads that write
  different values to one place; shared memory that two warps touch without a barrier between; barriers and warp-wide
  instructions that only some threads reach.
- Garbage: registers and shared memory start as NaN, and so does what `cp.async` has not brought yet.

What Triton emits for sm_80 and, with Hopper's products of a warpgroup (`wgmma`), for sm_90 is here; another instruction
raises NotImplementedError. Not shown: whether a `wgmma` was waited for, time, registers and spills (those are in
`bench/static_report.py`), races in general (warps run in step), what ptxas itself does wrong, and launching.
"""
