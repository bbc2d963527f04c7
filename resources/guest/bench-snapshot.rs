//! The first process of a guest of which snapshots are taken: fills memory, then changes a part of it for ever and beats.
//!
//! It writes `bench_fill=` MiB with words of which no page repeats another, sends one byte, and from then on changes a word of each of
//! the next `bench_pages=` pages of the first `bench_window=` MiB, sends the byte of a beat, sleeps `bench_pause=` microseconds, and so on.
//! With a window of 0 it changes nothing: what else is written by such a guest is its kernel's.
//!
//! It has no libc and needs no file but `/dev/console`. It does not know which VMM runs it. `alveole-bench` compiles it with `rustc` alone.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

/// Neither is ever part of a kernel message.
const FILLED: u8 = 0x02;
const BEAT: u8 = 0x07;

const PAGE_BYTES: usize = 4096;

const SYS_WRITE: usize = 1;
const SYS_MMAP: usize = 9;
const SYS_NANOSLEEP: usize = 35;
const SYS_REBOOT: usize = 169;

const PROT_READ_WRITE: usize = 3;
const MAP_PRIVATE_ANONYMOUS: usize = 0x22;

const REBOOT_MAGIC: [usize; 2] = [0xfee1_dead, 0x2812_1969];
const REBOOT_RESTART: usize = 0x0123_4567;

// The kernel starts a process with its arguments on the stack and no return address.
global_asm!(".globl _start", "_start:", "mov rdi, rsp", "and rsp, -16", "call {main}", "ud2", main = sym main);

fn call(number: usize, a: [usize; 6]) -> isize {
    let result;
    // SAFETY: the callers below pass numbers and pointers as the kernel defines them; the kernel
    // changes no registers but these.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    result
}

/// `stack` is the kernel's: argument count, argument pointers, 0, environment pointers, 0.
extern "C" fn main(stack: *const usize) -> ! {
    let fill_bytes = number(stack, b"bench_fill=") << 20;
    let window_bytes = number(stack, b"bench_window=") << 20;
    let beat_pages = number(stack, b"bench_pages=");
    let pause_us = number(stack, b"bench_pause=");
    if fill_bytes == 0 || window_bytes > fill_bytes {
        end();
    }
    let memory = call(
        SYS_MMAP,
        [
            0,
            fill_bytes,
            PROT_READ_WRITE,
            MAP_PRIVATE_ANONYMOUS,
            usize::MAX,
            0,
        ],
    );
    // Errors are the last 4095 values.
    if (-4095..=0).contains(&memory) {
        end();
    }
    let memory = memory as *mut u64;
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    for index in 0..fill_bytes / 8 {
        word = next(word);
        // SAFETY: within the mapping, in which no Rust object lives.
        unsafe { memory.add(index).write_volatile(word) };
    }
    send(FILLED);
    let pages = window_bytes / PAGE_BYTES;
    let mut page = 0;
    loop {
        for _ in 0..beat_pages.min(pages) {
            word = next(word);
            // SAFETY: as above.
            unsafe { memory.add(page * (PAGE_BYTES / 8)).write_volatile(word) };
            page += 1;
            if page >= pages {
                page = 0;
            }
        }
        send(BEAT);
        let time = [pause_us / 1_000_000, pause_us % 1_000_000 * 1000];
        call(SYS_NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0, 0]);
    }
}

/// Marsaglia's xorshift of 64 bits.
fn next(mut word: u64) -> u64 {
    word ^= word << 13;
    word ^= word >> 7;
    word ^ word << 17
}

fn send(byte: u8) {
    call(SYS_WRITE, [1, &raw const byte as usize, 1, 0, 0, 0]);
}

/// The number behind `key` in the environment, into which the kernel puts words of its command line that it does not know; 0 without.
fn number(stack: *const usize, key: &[u8]) -> usize {
    // SAFETY: the layout of a new process's stack; every pointer is to a string that ends with a
    // 0, which no byte of the key equals, so that nothing is read beyond the end.
    unsafe {
        let mut entry = stack.add(1 + *stack + 1).cast::<*const u8>();
        while !(*entry).is_null() {
            let mut at = 0;
            while at < key.len() && *(*entry).add(at) == key[at] {
                at += 1;
            }
            if at == key.len() {
                let mut value = 0_usize;
                while (*(*entry).add(at)).is_ascii_digit() {
                    let digit = usize::from(*(*entry).add(at) - b'0');
                    value = value.wrapping_mul(10).wrapping_add(digit);
                    at += 1;
                }
                return value;
            }
            entry = entry.add(1);
        }
    }
    0
}

/// Something is missing: a guest that ends is told from one that takes long.
fn end() -> ! {
    loop {
        call(
            SYS_REBOOT,
            [REBOOT_MAGIC[0], REBOOT_MAGIC[1], REBOOT_RESTART, 0, 0, 0],
        );
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    end()
}
