//! Kernels made byte by byte: the loader takes them, and they do one thing.

/// Where the code of a tiny kernel lies in guest memory.
pub(crate) const CODE_ADDR: u64 = 0x10_0000;
/// What it takes in guest memory: the code, then zeroes.
const MEMORY_BYTES: u64 = 0x1_0000;
/// Where the code lies in the file.
const CODE_OFFSET: usize = 0x1000;

/// A 64-bit ELF kernel with one segment: `code`, entered at its first byte in 64-bit mode.
pub(crate) fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    kernel_of_size(code, MEMORY_BYTES)
}

/// The same, taking `memory_bytes` in guest memory.
pub(crate) fn kernel_of_size(code: &[u8], memory_bytes: u64) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&[2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64, version 1
    put(&CODE_ADDR.to_le_bytes());
    put(&64u64.to_le_bytes()); // program headers; no section headers
    put(&[0; 12]);
    put(&[64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // sizes; one program header
    put(&[1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, read, write, execute
    for number in [
        CODE_OFFSET as u64,
        CODE_ADDR,
        CODE_ADDR,
        code.len() as u64,
        memory_bytes,
    ] {
        put(&number.to_le_bytes());
    }
    put(&0x1000u64.to_le_bytes());
    file.resize(CODE_OFFSET, 0);
    file.extend_from_slice(code);
    file
}
