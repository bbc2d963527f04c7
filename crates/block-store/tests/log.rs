//! What is said when a store is opened, and by which engine requests go where nobody chose: a program of its own, because a
//! process has one logger.

#![expect(unsafe_code, reason = "std sets no filters of system calls")]

mod support;

use std::fs;
use std::sync::{Mutex, PoisonError};

use alveole_block_store::{Cache, Engine, Format, OpenOptions, io_uring_available, open, tools};
use support::{file, folder, with};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Keep;

impl log::Log for Keep {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(format!("{} {}", record.level(), record.args()));
    }

    fn flush(&self) {}
}

fn told() -> Vec<String> {
    std::mem::take(&mut *LINES.lock().unwrap_or_else(PoisonError::into_inner))
}

/// One test: its parts would take each other's lines.
#[test]
fn what_is_worth_knowing_is_said_when_a_store_is_opened() {
    log::set_logger(&Keep).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    let folder = folder();
    let raw = file(folder.path(), "disk", 1 << 20);
    let image = folder.path().join("image.qcow2");
    tools::create_qcow2(&image, 1 << 20, 16).unwrap();
    told();

    // Nothing, where everything is as it should be.
    for (path, format) in [(&raw, Format::Raw), (&image, Format::Qcow2)] {
        let options = OpenOptions {
            format,
            ..with(Engine::Sync)
        };
        drop(open(path, &options).unwrap());
        let lines = told();
        assert!(lines.iter().all(|l| l.starts_with("INFO")), "{lines:?}");
        // Flushes that are ignored, in each format.
        let options = OpenOptions {
            cache: Cache::Unsafe,
            ..options
        };
        drop(open(path, &options).unwrap());
        let lines = told().join("\n");
        assert!(lines.contains("WARN "), "{lines}");
        assert!(lines.contains(path.to_str().unwrap()), "{lines}");
        assert!(lines.contains("flushes are ignored"), "{lines}");
    }

    // Bytes that no guest sees.
    fs::write(&raw, vec![0; 1000]).unwrap();
    assert_eq!(
        open(&raw, &with(Engine::Sync))
            .unwrap()
            .geometry()
            .size_bytes,
        512
    );
    let lines = told().join("\n");
    assert!(
        lines.contains("1000 bytes is no multiple of 512: the last 488"),
        "{lines}"
    );

    // The engine that is chosen, and the one that was asked for.
    let named = |engine| open(&raw, &with(engine)).map(|store| store.engine_name());
    assert_eq!(named(Engine::Sync).unwrap(), "sync");
    if io_uring_available().is_ok() {
        assert_eq!(named(Engine::Auto).unwrap(), "io_uring");
        assert_eq!(named(Engine::IoUring).unwrap(), "io_uring");
        forbid_io_uring();
    }
    let reason = io_uring_available().unwrap_err();
    told();
    assert_eq!(named(Engine::Auto).unwrap(), "sync");
    let lines = told().join("\n");
    assert!(lines.contains(&format!("no io_uring: {reason}")), "{lines}");
    let e = named(Engine::IoUring).unwrap_err().to_string();
    assert!(e.contains(&reason) && e.contains("engine=sync"), "{e}");
}

/// From now on this thread gets EPERM from io_uring_setup(2), as in a container.
fn forbid_io_uring() {
    let step = |code: u32, k: u32, (jt, jf)| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    // The number of the call is the first word of `struct seccomp_data`.
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, (0, 0)),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_io_uring_setup as u32,
            (0, 1),
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            (0, 0),
        ),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, (0, 0)),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which is as long as it says.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
}
