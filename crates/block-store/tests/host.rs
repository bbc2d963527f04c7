//! Files as hosts have them: locked, full, shrinking, missing, special; and queues that move between threads.

#![expect(unsafe_code, reason = "std has no epoll")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use alveole_block_store::{
    BlockStore, Cache, Engine, OpenOptions, Operation, RamStore, Request, StoreQueue,
    io_uring_available, look, open,
};
use alveole_guest_memory::GuestBuffers;
use support::{
    Loop, Mount, Rig, engines, file, folder, one, one_of, pattern, queue, ram, reader, skip, with,
};

const WRITE: Operation = Operation::Write { durable: false };

/// Who only looks is told the same.
fn refusal(path: &Path, options: &OpenOptions) -> String {
    let told = open(path, options).err().unwrap().to_string();
    assert_eq!(look(path, options).err().unwrap().to_string(), told);
    told
}

#[test]
fn what_is_no_disk_is_refused_with_words() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let fifo = at("fifo");
    Command::new("mkfifo").arg(&fifo).status().unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    File::create(at("empty")).unwrap();
    fs::write(at("tiny"), [0; 511]).unwrap();
    let own = OpenOptions::default();
    for (path, says) in [
        (
            at("missing"),
            "No such file or directory (os error 2); check the name",
        ),
        (folder.path().to_owned(), "it is a directory; name a file"),
        (fifo, "it is a FIFO"),
        (at("socket"), "it is a socket"),
        ("/dev/null".into(), "it is a character device"),
        (at("empty"), "less than one sector"),
        (at("tiny"), "less than one sector"),
    ] {
        let told = refusal(&path, &own);
        assert!(told.contains(says), "{told}");
        assert!(told.contains(path.to_str().unwrap()), "{told}");
    }
}

/// A file under a number, as whoever starts a jailed monitor hands it in.
#[test]
fn a_descriptor_is_a_disk() {
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    let held = File::options().read(true).write(true).open(&path).unwrap();
    // Its direct I/O is its own.
    let again = File::options().read(true).write(true).open(&path).unwrap();
    // Without a name there is no other way to it.
    fs::remove_file(&path).unwrap();
    for (engine, cache) in [
        (Engine::Sync, Cache::Writeback),
        (Engine::Auto, Cache::Writeback),
        (Engine::Auto, Cache::Direct),
        (Engine::Sync, Cache::Unsafe),
    ] {
        let by_number = format!("/dev/fd/{}", held.as_raw_fd());
        let options = OpenOptions {
            engine,
            cache,
            ..OpenOptions::default()
        };
        let store = match open(Path::new(&by_number), &options) {
            Ok(store) => store,
            Err(e) if cache == Cache::Direct => {
                skip("a_descriptor_is_a_disk", &format!("direct I/O: {e}"));
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        let mut rig = Rig::new(store, 1, 8, pattern(1 << 20, 1));
        rig.submit(0, Operation::Read, 0, 1 << 20, 0);
        rig.settle();
        // The same again for the next one.
        rig.submit(0, WRITE, 8192, 4096, 0);
        rig.settle();
        let mut found = vec![0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&again, &mut found, 8192).unwrap();
        assert_eq!(found, rig.model[8192..12288]);
        let before = &pattern(1 << 20, 1)[8192..12288];
        std::os::unix::fs::FileExt::write_all_at(&again, before, 8192).unwrap();
    }
}

#[test]
fn a_descriptor_opened_in_another_way_is_refused() {
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    let mut options = File::options();
    let reading = options.read(true).open(&path).unwrap();
    let writing = File::options().write(true).open(&path).unwrap();
    let appending = File::options().read(true).append(true).open(&path).unwrap();
    use std::os::unix::fs::OpenOptionsExt;
    let bare = options.custom_flags(libc::O_PATH).open(&path).unwrap();
    let null = File::open("/dev/null").unwrap();
    let own = OpenOptions::default();
    for (held, says) in [
        (
            &reading,
            "opened for reading only; open it for writing, too",
        ),
        (&writing, "opened for writing only"),
        (&appending, "without O_APPEND"),
        (&bare, "O_PATH"),
        (&null, "it is a character device"),
    ] {
        let by_number = format!("/proc/self/fd/{}", held.as_raw_fd());
        let told = refusal(Path::new(&by_number), &own);
        assert!(told.contains(says) && told.contains(&by_number), "{told}");
    }
    let read_only = OpenOptions {
        read_only: true,
        ..own
    };
    let by_number = format!("/dev/fd/{}", reading.as_raw_fd());
    assert!(open(Path::new(&by_number), &read_only).is_ok());
    let told = refusal(Path::new("/dev/fd/999999"), &own);
    assert!(
        told.contains("descriptor 999999 is not open") && told.contains("--pass-fd 999999"),
        "{told}"
    );
}

#[test]
fn a_file_without_the_right_to_write_can_be_read() {
    let folder = folder();
    let path = file(folder.path(), "iso", 4096);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let mut path = path;
    let mut mounted = None;
    if File::options().write(true).open(&path).is_ok() {
        // Root may write to anything, but not to a file system that is mounted for reading.
        let place = folder.path().join("mounted");
        fs::create_dir(&place).unwrap();
        mounted = Mount::tmpfs(&place, "size=1m");
        path = file(&place, "iso", 4096);
        let only_read = Command::new("mount")
            .args(["-o", "remount,ro"])
            .arg(&place)
            .status();
        assert!(only_read.unwrap().success(), "root could not mount");
    }
    let told = refusal(&path, &OpenOptions::default());
    assert!(told.contains("use it read-only"), "{told}");
    let store = open(&path, &reader()).unwrap();
    let ram = ram();
    let mut buffers = GuestBuffers::new(&ram);
    buffers.push(0, 512).unwrap();
    let mut queue = queue(&store);
    let e = one(&mut *queue, WRITE, 0, buffers.part(0, 512)).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    one(&mut *queue, Operation::Read, 0, buffers).unwrap();
    drop((queue, store, mounted));
}

#[test]
fn requests_that_do_not_fit_are_refused_by_every_store() {
    let folder = folder();
    let mut stores: Vec<Arc<dyn BlockStore>> = vec![Arc::new(RamStore::new(8192))];
    for (n, engine) in engines().into_iter().enumerate() {
        let path = file(folder.path(), &n.to_string(), 8192 + 100);
        stores.push(open(&path, &with(engine)).unwrap());
    }
    let ram = ram();
    for store in stores {
        assert_eq!(store.geometry().size_bytes, 8192);
        let mut queue = queue(&store);
        for (offset, len) in [
            (8192, 512),
            (7680, 1024),
            (u64::MAX - 511, 512),
            (1, 512),
            (0, 511),
            (0, 1 << 20),
        ] {
            for operation in [Operation::Read, WRITE] {
                let mut buffers = GuestBuffers::new(&ram);
                buffers.push(0, len).unwrap();
                one(&mut *queue, operation, offset, buffers).unwrap_err();
            }
            let zero = Operation::WriteZeroes { may_unmap: true };
            for operation in [Operation::Discard, zero] {
                let none = GuestBuffers::new(&ram);
                one_of(&mut *queue, operation, offset, len, none).unwrap_err();
            }
        }
        // Another length than the buffers have.
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push(0, 1024).unwrap();
        one_of(&mut *queue, Operation::Read, 0, 512, buffers).unwrap_err();
        one_of(
            &mut *queue,
            Operation::Discard,
            0,
            8192,
            GuestBuffers::new(&ram),
        )
        .unwrap();
    }
}

#[test]
fn a_file_that_shrinks_gives_errors_and_no_zeroes() {
    for engine in engines() {
        let folder = folder();
        let path = file(folder.path(), "disk", 1 << 20);
        let store = open(&path, &with(engine)).unwrap();
        let ram = ram();
        let mut queue = queue(&store);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(512 << 10)
            .unwrap();
        for (offset, len) in [(512_u64 << 10, 4096), ((512 << 10) - 512, 1024)] {
            let mut buffers = GuestBuffers::new(&ram);
            buffers.push(0, len).unwrap();
            let e = one(&mut *queue, Operation::Read, offset, buffers).unwrap_err();
            assert_eq!(e.kind(), std::io::ErrorKind::UnexpectedEof);
        }
        assert_eq!(store.refresh().unwrap().size_bytes, 512 << 10);
        assert_eq!(queue.geometry().size_bytes, 512 << 10);
        assert_eq!(store.resize(2 << 20).unwrap().size_bytes, 2 << 20);
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push(0, 4096).unwrap();
        one(&mut *queue, WRITE, (2 << 20) - 4096, buffers).unwrap();
    }
}

#[test]
fn what_was_cut_off_is_zeroes_once_a_write_has_made_the_file_longer() {
    for engine in engines() {
        let folder = folder();
        let path = file(folder.path(), "disk", 1 << 20);
        let before = fs::read(&path).unwrap();
        let store = open(&path, &with(engine)).unwrap();
        let ram = ram();
        let mut queue = queue(&store);
        let cut = |len| {
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(len)
        };
        let buffers = || {
            let mut buffers = GuestBuffers::new(&ram);
            buffers.push(0, 4096).unwrap();
            buffers
        };
        cut(256 << 10).unwrap();
        one(&mut *queue, Operation::Read, 512 << 10, buffers()).unwrap_err();
        let written = buffers();
        written.copy_from(0, &[9; 4096]);
        one(&mut *queue, WRITE, 768 << 10, written).unwrap();
        // As far as that write everything is there again, and behind it nothing.
        one(&mut *queue, Operation::Read, 900 << 10, buffers()).unwrap_err();
        one(&mut *queue, Operation::Read, 512 << 10, buffers()).unwrap();
        one(&mut *queue, Operation::Flush, 0, GuestBuffers::new(&ram)).unwrap();
        let after = fs::read(&path).unwrap();
        assert_eq!(after.len(), (768 << 10) + 4096);
        assert!(after[..256 << 10] == before[..256 << 10]);
        assert!(after[256 << 10..768 << 10].iter().all(|b| *b == 0));
        assert!(after[768 << 10..].iter().all(|b| *b == 9));
        // A new look tells the guest's device the size that is left.
        assert_eq!(store.refresh().unwrap().size_bytes, (768 << 10) + 4096);
    }
}

#[test]
fn a_full_disk_is_an_error_until_there_is_room_again() {
    let test = "a_full_disk_is_an_error_until_there_is_room_again";
    let folder = folder();
    let Some(mount) = Mount::tmpfs(folder.path(), "size=2m") else {
        skip(test, "this user may not mount");
        return;
    };
    for engine in engines() {
        let path = mount.0.join("disk");
        fs::remove_file(&path).ok();
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let filler = mount.0.join("filler");
        fs::write(&filler, vec![1; 1 << 20]).unwrap();
        let store = open(&path, &with(engine)).unwrap();
        let ram = ram();
        let mut queue = queue(&store);
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push(0, 2 << 20).unwrap();
        let e = one(&mut *queue, WRITE, 0, buffers.part(0, 2 << 20)).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{e}");
        // tmpfs has no FALLOC_FL_ZERO_RANGE: zeroes are written, and there is no room for them either.
        let zero = Operation::WriteZeroes { may_unmap: false };
        let none = || GuestBuffers::new(&ram);
        let e = one_of(&mut *queue, zero, 4 << 20, 2 << 20, none()).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{e}");
        one_of(&mut *queue, Operation::Discard, 0, 8 << 20, none()).unwrap();
        fs::remove_file(&filler).unwrap();
        one(&mut *queue, WRITE, 0, buffers.part(0, 1 << 20)).unwrap();
        one(&mut *queue, Operation::Flush, 0, none()).unwrap();
        one_of(&mut *queue, zero, 0, 64 << 10, none()).unwrap();
        let small = buffers.part(0, 128 << 10);
        small.copy_from(0, &vec![7; 128 << 10]);
        let back = one(&mut *queue, Operation::Read, 0, small).unwrap();
        let mut bytes = vec![7; 128 << 10];
        back.copy_to(0, &mut bytes);
        assert!(bytes[..64 << 10].iter().all(|b| *b == 0));
    }
}

#[test]
fn queues_move_between_threads_with_requests_in_flight() {
    for (engine, cache) in engines()
        .into_iter()
        .flat_map(|e| [(e, Cache::Writeback), (e, Cache::Direct)])
    {
        let folder = folder();
        let path = file(folder.path(), "disk", 4 << 20);
        let options = OpenOptions {
            cache,
            ..with(engine)
        };
        let store = match open(&path, &options) {
            Ok(store) => store,
            Err(e) => {
                skip(
                    "queues_move_between_threads_with_requests_in_flight",
                    &e.to_string(),
                );
                continue;
            }
        };
        let mut rig = Rig::new(store, 2, 16, pattern(4 << 20, 1));
        for round in 0..20_u64 {
            for n in 0..32 {
                let at = (n * 128 + round) % 1000 * 4096;
                let operation = if n % 3 == 0 { Operation::Read } else { WRITE };
                rig.submit(
                    (n % 2) as usize,
                    operation,
                    at,
                    4096,
                    if n % 5 == 0 { 1000 } else { 0 },
                );
            }
            rig.kick(0);
            rig = thread::spawn(move || {
                rig.kick(1);
                rig
            })
            .join()
            .unwrap();
            rig = thread::spawn(move || {
                rig.settle();
                rig
            })
            .join()
            .unwrap();
        }
        assert!(rig.read_all() == rig.model);
    }
}

#[test]
fn the_descriptor_tells_of_every_completion() {
    let folder = folder();
    let path = file(folder.path(), "disk", 4 << 20);
    if io_uring_available().is_err() {
        skip("the_descriptor_tells_of_every_completion", "no io_uring");
        return;
    }
    for cache in [Cache::Writeback, Cache::Direct] {
        let options = OpenOptions {
            cache,
            ..with(Engine::IoUring)
        };
        let Ok(store) = open(&path, &options) else {
            skip("the_descriptor_tells_of_every_completion", "no direct I/O");
            continue;
        };
        let ram = ram();
        let mut queue = queue(&store);
        let fd = queue.event_fd().unwrap().as_raw_fd();
        // As an event loop watches it: edges, never read.
        // SAFETY: takes no pointer.
        let epoll = unsafe { libc::epoll_create1(0) };
        let mut event = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLET) as u32,
            u64: 1,
        };
        // SAFETY: one event.
        unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        let mut done = Vec::new();
        for round in 0..2000_u64 {
            // Reads complete at once from the page cache; zeroes and flushes go to a worker of the kernel.
            for n in 0..round % 4 + 1 {
                let operation = match round % 7 {
                    0 => Operation::WriteZeroes { may_unmap: false },
                    1 | 2 => WRITE,
                    _ => Operation::Read,
                };
                let mut buffers = GuestBuffers::new(&ram);
                if operation == Operation::Read || operation == WRITE {
                    buffers.push(n * 8192, 4096).unwrap();
                }
                queue.submit(Request {
                    tag: n,
                    operation,
                    offset: (round * 4 + n) % 1000 * 4096,
                    len: 4096,
                    buffers,
                });
            }
            queue.kick(&mut done);
            while queue.in_flight() > 0 {
                // SAFETY: room for one event.
                let n = unsafe { libc::epoll_wait(epoll, &raw mut event, 1, 10_000) };
                // The kernel interrupts the wait to post completions.
                let interrupted =
                    std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted;
                if n < 0 && interrupted {
                    continue;
                }
                assert_eq!(n, 1, "round {round}: nobody told of a completion");
                queue.collect(&mut done);
            }
            assert_eq!(done.len() as u64, round % 4 + 1);
            assert!(done.drain(..).all(|c| c.result.is_ok()));
        }
        // SAFETY: ours, and not used any more.
        unsafe { libc::close(epoll) };
    }
}

#[test]
fn a_write_that_comes_alone_is_done_when_it_is_kicked() {
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    for engine in engines() {
        let store = open(&path, &with(engine)).unwrap();
        let ram = ram();
        let mut queue = queue(&store);
        let mut done = Vec::new();
        for round in 1..100_u8 {
            let mut buffers = GuestBuffers::new(&ram);
            buffers.push(0, 4096).unwrap();
            buffers.copy_from(0, &[round; 4096]);
            queue.submit(Request {
                tag: round.into(),
                operation: WRITE,
                offset: u64::from(round) * 8192,
                len: 4096,
                buffers,
            });
            assert_eq!(queue.in_flight(), 1);
            queue.kick(&mut done);
            // No worker of the kernel had it: nobody has to wait for one.
            assert_eq!((done.len(), queue.in_flight()), (1, 0), "{engine:?}");
            done.remove(0).result.unwrap();
            let at = usize::from(round) * 8192;
            assert!(fs::read(&path).unwrap()[at..at + 4096] == [round; 4096]);
        }
        // Stopping a device kicks what was not.
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push(0, 512).unwrap();
        buffers.copy_from(0, &[0xee; 512]);
        queue.submit(Request {
            tag: 0,
            operation: WRITE,
            offset: 0,
            len: 512,
            buffers,
        });
        queue.drain(&mut done);
        assert_eq!(done.len(), 1);
        assert_eq!(fs::read(&path).unwrap()[..512], [0xee; 512]);
    }
}

/// A second process that holds a lock until it is dropped.
struct Holder(Child);

impl Holder {
    /// Runs `program` and waits until it has locked bytes 100 to `last`, for some time on end: QEMU takes, drops and takes
    /// them again while it opens an image.
    fn new(program: &mut Command, last: u64) -> Option<Self> {
        let child = program
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let folder = format!("/proc/{}/fdinfo", child.id());
        let mut seen = 0;
        for _ in 0..1000 {
            let locked = fs::read_dir(&folder)
                .unwrap()
                .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
                .any(|text| text.contains(&format!(" 100 {last}\n")));
            seen = if locked { seen + 1 } else { 0 };
            if seen == 20 {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        Some(Self(child))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The second process of `another_process…`: holds a lock while its standard input is open.
#[test]
fn hold_a_lock() {
    let Some(path) = std::env::var_os("ALVEOLE_TEST_HOLD") else {
        return;
    };
    let options = if std::env::var_os("ALVEOLE_TEST_READ").is_some() {
        reader()
    } else {
        OpenOptions::default()
    };
    let store = open(Path::new(&path), &options).unwrap();
    let _queue = queue(&store);
    println!("\nheld");
    std::io::stdout().flush().unwrap();
    thread::sleep(Duration::from_secs(60));
}

fn holder(path: &Path, read: bool) -> Holder {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program
        .args(["--nocapture", "--exact", "hold_a_lock"])
        .env("ALVEOLE_TEST_HOLD", path);
    if read {
        program.env("ALVEOLE_TEST_READ", "1");
    }
    let mut child = program
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.as_mut().unwrap());
    assert!(
        output.lines().map(Result::unwrap).any(|l| l == "held"),
        "the second process did not open the image"
    );
    Holder(child)
}

#[test]
fn another_process_is_kept_off_and_named() {
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    let writer = holder(&path, false);
    let pid = writer.0.id();
    for options in [OpenOptions::default(), reader()] {
        let told = refusal(&path, &options);
        assert!(told.contains(&format!("process {pid} (")), "{told}");
        assert!(told.contains("open to write"), "{told}");
    }
    let free = OpenOptions {
        lock: false,
        ..OpenOptions::default()
    };
    drop(open(&path, &free).unwrap());
    // Killed, its ring may hold the lock for a moment yet.
    drop(writer);
    drop(open(&path, &OpenOptions::default()).unwrap());
    let other = holder(&path, true);
    let shared = open(&path, &reader()).unwrap();
    let told = refusal(&path, &OpenOptions::default());
    assert!(told.contains("open to read"), "{told}");
    assert!(
        told.contains(&format!("process {} (", other.0.id())),
        "{told}"
    );
    assert!(told.contains("this process itself"), "{told}");
    drop((other, shared));
    open(&path, &OpenOptions::default()).unwrap();
}

#[test]
fn an_image_that_is_lent_for_a_moment_is_waited_for() {
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    let first = open(&path, &OpenOptions::default()).unwrap();
    // As between fork and exec: a child has all that its parent has open. It only sleeps, and ends.
    // SAFETY: the child calls nothing but what may be called after fork(2) in a process with threads.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::usleep(60_000);
            libc::_exit(0);
        }
        child
    };
    assert!(child > 0);
    drop(first);
    open(&path, &OpenOptions::default()).unwrap();
    // SAFETY: our own child, and no status is asked for.
    let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    assert_eq!(waited, child);
}

#[test]
fn an_image_is_opened_again_at_once() {
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    for _ in 0..20 {
        let start = Instant::now();
        let store = open(&path, &OpenOptions::default()).unwrap();
        let mut rig = Rig::new(store, 2, 4, fs::read(&path).unwrap());
        rig.submit(0, WRITE, 0, 4096, 0);
        rig.kick(0);
        drop(rig);
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn qemu_and_we_keep_each_other_off() {
    let test = "qemu_and_we_keep_each_other_off";
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    let name = path.to_str().unwrap();
    let qemu = |read: bool| {
        let mut program = Command::new("qemu-io");
        program.args(["-f", "raw", "-c", "length", "-c", "sleep 60000"]);
        if read {
            program.arg("-r");
        }
        Holder::new(program.arg(name), if read { 100 } else { 101 })
    };
    let Some(writer) = qemu(false) else {
        skip(test, "no qemu-io");
        return;
    };
    let told = refusal(&path, &reader());
    assert!(
        told.contains(&format!("process {} (qemu-io)", writer.0.id())),
        "{told}"
    );
    refusal(&path, &OpenOptions::default());
    drop(writer);
    let second = qemu(true);
    drop(open(&path, &reader()).unwrap());
    drop(second);
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() || told.contains("lock"), "{told}");
        output.status.success()
    };
    let write = ["-f", "raw", "-c", "write 0 512", name];
    for options in [OpenOptions::default(), reader()] {
        let ours = open(&path, &options).unwrap();
        assert!(!run("qemu-io", &write));
        drop(ours);
    }
    assert!(run("qemu-io", &write));
    // The format driver of QEMU asks for more.
    let image = folder.path().join("image");
    alveole_block_store::tools::create_qcow2(&image, 1 << 20, 16).unwrap();
    let options = OpenOptions {
        format: alveole_block_store::Format::Qcow2,
        ..OpenOptions::default()
    };
    let ours = open(&image, &options).unwrap();
    let info = ["info", "-f", "qcow2", image.to_str().unwrap()];
    assert!(!run("qemu-img", &info));
    drop(ours);
    let read_only = OpenOptions {
        read_only: true,
        ..options
    };
    let _ours = open(&image, &read_only).unwrap();
    assert!(run("qemu-img", &info));
}

/// One thread writes whole blocks, another their first halves: the second halves must be the whole blocks'.
fn parts_and_wholes_from_two_threads(folder: &tempfile::TempDir) {
    const BLOCKS: u64 = 256;
    for engine in engines() {
        let path = file(folder.path(), "two", 1 << 20);
        let device = Loop::new(&path, &["-b", "4096"]).unwrap();
        let options = OpenOptions {
            cache: Cache::Direct,
            ..with(engine)
        };
        let store = open(&device.0, &options).unwrap();
        let mut queues = store.open_queues(2, 16).unwrap();
        let write = |mut queue: Box<dyn StoreQueue>, len: u64, byte: u8| {
            move || {
                let ram = ram();
                let mut buffers = GuestBuffers::new(&ram);
                buffers.push(0, len).unwrap();
                buffers.copy_from(0, &vec![byte; len as usize]);
                let mut done = Vec::new();
                for tag in 0..BLOCKS {
                    queue.submit(Request {
                        tag,
                        operation: WRITE,
                        offset: tag * 4096,
                        len,
                        buffers: buffers.part(0, len),
                    });
                    if tag % 4 == 0 {
                        queue.kick(&mut done);
                    }
                }
                queue.drain(&mut done);
                assert_eq!(done.len() as u64, BLOCKS);
                assert!(done.iter().all(|c| c.result.is_ok()));
            }
        };
        let threads = [
            thread::spawn(write(queues.remove(0), 4096, 1)),
            thread::spawn(write(queues.remove(0), 2048, 2)),
        ];
        for thread in threads {
            thread.join().unwrap();
        }
        drop(store);
        let all = fs::read(&device.0).unwrap();
        for block in all.chunks(4096) {
            assert!(
                block[2048..].iter().all(|b| *b == 1),
                "a whole block was lost"
            );
        }
    }
}

#[test]
fn block_devices_are_disks() {
    let test = "block_devices_are_disks";
    let folder = folder();
    for block in ["512", "4096"] {
        let path = file(folder.path(), block, 1 << 20);
        let device = match Loop::new(&path, &["-b", block]) {
            Ok(device) => device,
            Err(reason) => {
                skip(test, &reason);
                return;
            }
        };
        for (engine, cache) in engines()
            .into_iter()
            .flat_map(|e| [(e, Cache::Writeback), (e, Cache::Direct)])
        {
            let options = OpenOptions {
                cache,
                ..with(engine)
            };
            let before = fs::read(&path).unwrap();
            let store = open(&device.0, &options).unwrap();
            assert_eq!(store.geometry().block_size_bytes.to_string(), block);
            store.resize(4096).unwrap_err();
            let mut rig = Rig::new(store, 2, 8, before);
            // Parts of blocks among whole ones, in both queues: none may be lost.
            for n in 0..400_u64 {
                let queue = (n % 2) as usize;
                let sector = n * 7 % 1900;
                let (at, len) = if n % 3 == 0 {
                    (sector / 8 * 4096, 4096)
                } else {
                    (sector * 512, 512 * (n % 11 + 1))
                };
                let operation = match n % 13 {
                    5 => Operation::WriteZeroes { may_unmap: true },
                    6 => Operation::WriteZeroes { may_unmap: false },
                    7 => Operation::Read,
                    8 => Operation::Write { durable: true },
                    _ => WRITE,
                };
                rig.submit(queue, operation, at, len, if n % 5 == 0 { 777 } else { 0 });
                if n % 4 == 0 {
                    rig.kick(queue);
                }
            }
            assert!(rig.read_all() == rig.model, "{engine:?} {cache:?} {block}");
            rig.submit(0, Operation::Flush, 0, 0, 0);
            rig.settle();
            let none = GuestBuffers::new(&rig.ram);
            one_of(
                &mut *rig.queues[0],
                Operation::Discard,
                512,
                100 * 512,
                none,
            )
            .unwrap();
        }
    }
    parts_and_wholes_from_two_threads(&folder);
    let path = file(folder.path(), "ro", 1 << 20);
    let device = Loop::new(&path, &["-r"]).unwrap();
    let told = refusal(&device.0, &OpenOptions::default());
    assert!(told.contains("read-only"), "{told}");
    assert!(open(&device.0, &reader()).unwrap().geometry().read_only);
}

#[test]
fn a_flood_of_pieces_goes_through() {
    for engine in engines() {
        let folder = folder();
        let path = file(folder.path(), "disk", 1 << 20);
        let store = open(&path, &with(engine)).unwrap();
        let ram = ram();
        let mut queue = queue(&store);
        // More ranges than one call takes, and more requests than the ring has places.
        let mut done = Vec::new();
        for tag in 0..40 {
            let mut buffers = GuestBuffers::new(&ram);
            for n in 0..4096_u64 {
                buffers.push(tag * 4096 * 20 + n * 19, 16).unwrap();
            }
            queue.submit(Request {
                tag,
                operation: Operation::Read,
                offset: tag * 512,
                len: 65536,
                buffers,
            });
        }
        assert_eq!(queue.in_flight(), 40);
        queue.kick(&mut done);
        queue.drain(&mut done);
        let all = fs::read(&path).unwrap();
        for c in done {
            c.result.unwrap();
            let mut bytes = vec![0; 65536];
            c.buffers.copy_to(0, &mut bytes);
            let at = c.tag as usize * 512;
            assert!(bytes == all[at..at + 65536]);
        }
        // Dropped with requests in flight.
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push(0, 1 << 20).unwrap();
        queue.submit(Request {
            tag: 0,
            operation: Operation::Read,
            offset: 0,
            len: 1 << 20,
            buffers,
        });
    }
}
