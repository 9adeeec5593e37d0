"""CPU kernels in C, built once by the system's compiler: products, attention over pages, and what lies between them."""
