//! The first process of a guest that is measured: says that it runs, then ends the guest.
//!
//! Its first act is one byte on the console, so that the host sees when user space began. Then it
//! writes Firecracker's boot timer, if the machine has one, and does what the kernel command line
//! says: `bench_end=off` powers off, `bench_end=restart` reboots, `bench_end=wait` sleeps (so that
//! somebody can look at the VMM from outside) and powers off in the end.
//!
//! It has no libc and needs no files but `/dev/console` and, for the boot timer, `/dev/mem`. It does
//! not know which VMM runs it, nor what is measured. `alveole-bench` compiles it with `rustc` alone.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

/// Never part of a kernel message.
const MARKER: u8 = 0x02;

/// Where Firecracker's boot timer device is, and what says that the guest has booted.
const BOOT_TIMER_ADDR: usize = 0xc000_0000;
const BOOT_TIMER_BOOTED: u8 = 123;

/// A guest that everybody forgot ends by itself.
const WAIT_SECONDS: u64 = 60;

const SYS_WRITE: usize = 1;
const SYS_OPEN: usize = 2;
const SYS_MMAP: usize = 9;
const SYS_IOCTL: usize = 16;
const SYS_NANOSLEEP: usize = 35;
const SYS_REBOOT: usize = 169;

const O_RDWR_SYNC: usize = 0o4_010_002;
const PROT_WRITE: usize = 2;
const MAP_SHARED: usize = 1;

const TCSBRK: usize = 0x5409;

const REBOOT_MAGIC: [usize; 2] = [0xfee1_dead, 0x2812_1969];
const REBOOT_OFF: usize = 0x4321_fedc;
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
    let marker = MARKER;
    call(SYS_WRITE, [1, &raw const marker as usize, 1, 0, 0, 0]);
    tell_boot_timer();
    // The driver sends by interrupt; an end of the guest would not wait for that.
    call(SYS_IOCTL, [1, TCSBRK, 1, 0, 0, 0]);
    match wanted_end(stack) {
        b'r' => reboot(REBOOT_RESTART),
        b'w' => {
            sleep(WAIT_SECONDS);
            reboot(REBOOT_OFF)
        }
        _ => reboot(REBOOT_OFF),
    }
}

fn tell_boot_timer() {
    let file = call(
        SYS_OPEN,
        [c"/dev/mem".as_ptr() as usize, O_RDWR_SYNC, 0, 0, 0, 0],
    );
    if file < 0 {
        return;
    }
    let page = call(
        SYS_MMAP,
        [
            0,
            4096,
            PROT_WRITE,
            MAP_SHARED,
            file as usize,
            BOOT_TIMER_ADDR,
        ],
    );
    if page > 0 {
        // SAFETY: a page that was just mapped and that no Rust object lives in. Where there is no
        // such device, the write goes nowhere.
        unsafe { (page as *mut u8).write_volatile(BOOT_TIMER_BOOTED) };
    }
}

/// The first letter of what `bench_end=` says, or 0.
fn wanted_end(stack: *const usize) -> u8 {
    const KEY: &[u8; 10] = b"bench_end=";
    // SAFETY: the layout of a new process's stack; every pointer is to a string that ends with a
    // 0, which no byte of the key equals, so that nothing is read beyond the end.
    unsafe {
        let mut entry = stack.add(1 + *stack + 1).cast::<*const u8>();
        while !(*entry).is_null() {
            let mut at = 0;
            while at < KEY.len() && *(*entry).add(at) == KEY[at] {
                at += 1;
            }
            if at == KEY.len() {
                return *(*entry).add(at);
            }
            entry = entry.add(1);
        }
    }
    0
}

fn sleep(seconds: u64) {
    let time = [seconds, 0];
    call(SYS_NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0, 0]);
}

fn reboot(how: usize) -> ! {
    call(SYS_REBOOT, [REBOOT_MAGIC[0], REBOOT_MAGIC[1], how, 0, 0, 0]);
    // The kernel of a guest without any way to end comes back here; the first process must not.
    loop {
        sleep(WAIT_SECONDS);
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    reboot(REBOOT_OFF)
}
