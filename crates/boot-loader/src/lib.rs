//! Kernel, initrd, command line and tables to an entry state.
