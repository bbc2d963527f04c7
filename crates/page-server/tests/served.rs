//! Memory of this process, served by a thread of this process: content, what is given back, clients that are no good.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]
#![expect(unsafe_code, reason = "pages are given back by madvise(2)")]

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use alveole_guest_memory::test_server::may_serve;
use alveole_guest_memory::{GuestRam, HostPages, MemoryPlan, PageServer};
use alveole_page_server::{Memory, ServeError, Serving, pack, serve};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

const PAGE: u64 = 4096;
const PAGES: u64 = 2048;

/// What is in a page of the file: every third has something, in runs; from the middle on there is a hole.
fn content(page: u64) -> Vec<u8> {
    let byte = match page {
        _ if (PAGES / 2..PAGES - 4).contains(&page) => 0,
        _ if (page / 5).is_multiple_of(3) => (page % 251) as u8 + 1,
        _ => 0,
    };
    vec![byte; PAGE as usize]
}

fn plain() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGES * PAGE + 7).unwrap();
    for page in 0..PAGES {
        let bytes = content(page);
        if bytes[0] != 0 {
            file.write_all_at(&bytes, page * PAGE).unwrap();
        }
    }
    file.write_all_at(b"the end", PAGES * PAGE).unwrap();
    file
}

fn packed() -> File {
    let into = tempfile::tempfile().unwrap();
    pack(&plain(), &into).unwrap();
    into
}

struct Server {
    folder: tempfile::TempDir,
    said: Arc<Mutex<Vec<String>>>,
    result: mpsc::Receiver<Result<(), ServeError>>,
}

impl Server {
    fn new(file: File, serving: Serving) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let said = Arc::<Mutex<Vec<String>>>::default();
        let (of_thread, (to, result)) = (Arc::clone(&said), mpsc::channel());
        std::thread::spawn(move || {
            let mut memory = Memory::open(file, 1 << 20).unwrap();
            let result = serve(listener, &mut memory, serving, |line| {
                of_thread.lock().unwrap().push(line.to_owned());
            });
            let _ = to.send(result);
        });
        Self {
            folder,
            said,
            result,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn guest(&self) -> (PageServer, GuestRam) {
        guest(&self.path())
    }

    /// Waits until it has said something with these words.
    fn says(&self, part: &str) {
        for _ in 0..2000 {
            if self.said.lock().unwrap().iter().any(|l| l.contains(part)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("not {part:?}: {:?}", self.said.lock().unwrap());
    }
}

fn guest(path: &Path) -> (PageServer, GuestRam) {
    let server = PageServer::connect(path).unwrap();
    let plan = MemoryPlan::around_hole(PAGES * PAGE).unwrap();
    let ram = GuestRam::map_served(&plan, &server, HostPages::Anonymous).unwrap();
    (server, ram)
}

fn check(ram: &GuestRam, page: u64) {
    let mut bytes = vec![0xff; PAGE as usize];
    ram.read(page * PAGE, &mut bytes).unwrap();
    assert!(bytes == content(page), "page {page}");
}

#[test]
fn every_page_is_that_of_the_file() {
    if !may_serve("every_page_is_that_of_the_file") {
        return;
    }
    for file in [plain, packed] {
        for at_once_bytes in [4096, 64 << 10, 1 << 20] {
            let server = Server::new(
                file(),
                Serving {
                    at_once_bytes,
                    ..Serving::default()
                },
            );
            // Several at once, each in an order of its own, and from several threads.
            std::thread::scope(|scope| {
                for number in 0..3 {
                    let path = server.path();
                    scope.spawn(move || {
                        let (_connection, ram) = guest(&path);
                        let ram = &ram;
                        ram.write(9 * PAGE + 5, &[200]).unwrap();
                        std::thread::scope(|scope| {
                            for step in [1, 1021 + 2 * number] {
                                scope.spawn(move || {
                                    let pages = (0..PAGES).map(|p| p * step % PAGES);
                                    for page in pages.filter(|p| *p != 9) {
                                        check(ram, page);
                                    }
                                });
                            }
                        });
                        let mut wanted = content(9);
                        wanted[5] = 200;
                        let mut bytes = vec![0; PAGE as usize];
                        ram.read(9 * PAGE, &mut bytes).unwrap();
                        assert!(bytes == wanted, "what was written is there no more");
                    });
                }
            });
            assert_eq!(*server.said.lock().unwrap(), [""; 0]);
        }
    }
}

#[test]
fn what_is_given_back_is_zero_from_then_on() {
    if !may_serve("what_is_given_back_is_zero_from_then_on") {
        return;
    }
    let server = Server::new(packed(), Serving::default());
    let (_connection, ram) = server.guest();
    let (_, host) = ram.mapped_ranges().next().unwrap();
    let first = (0..PAGES).find(|page| content(*page)[0] != 0).unwrap();
    check(&ram, first);
    for pages in [first..first + 1, 40..200] {
        let len = (pages.end - pages.start) * PAGE;
        let addr = (host + pages.start * PAGE) as *mut libc::c_void;
        // SAFETY: memory of this test alone, which nobody has references to. It waits until the server was told.
        let done = unsafe { libc::madvise(addr, len as usize, libc::MADV_DONTNEED) };
        assert_eq!(done, 0);
        for page in pages {
            assert_eq!(
                ram.read_plain::<u64>(page * PAGE).unwrap(),
                0,
                "page {page}"
            );
        }
    }
    for page in (200..PAGES).chain(first + 1..40) {
        check(&ram, page);
    }
}

#[test]
fn the_only_client_ends_it() {
    if !may_serve("the_only_client_ends_it") {
        return;
    }
    let once = Serving {
        once: true,
        ..Serving::default()
    };
    let server = Server::new(packed(), once);
    let (connection, ram) = server.guest();
    check(&ram, 0);
    assert!(server.result.try_recv().is_err());
    // Nobody else is taken.
    let other = UnixStream::connect(server.path());
    drop((connection, other));
    let result = server.result.recv_timeout(Duration::from_secs(20));
    assert!(matches!(result, Ok(Ok(()))), "{result:?}");
}

#[test]
fn a_chunk_that_is_damaged_ends_the_guest_that_wants_it() {
    if !may_serve("a_chunk_that_is_damaged_ends_the_guest_that_wants_it") {
        return;
    }
    let file = packed();
    // In the middle of the first frame.
    let mut byte = [0];
    file.read_exact_at(&mut byte, 30).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 30).unwrap();
    let server = Server::new(file, Serving::default());
    let (connection, ram) = server.guest();
    check(&ram, PAGES - 1);
    let why = connection.watch_while(&ram, || ram.read_plain::<u8>(0).unwrap());
    assert!(why.unwrap_err().to_string().contains("is gone"));
    server.says("frame 0");
    // Others are served as before.
    let (_connection, ram) = server.guest();
    check(&ram, PAGES - 1);
}

/// Connects and says this, with these descriptors; gives what becomes of the connection.
fn say(server: &Server, text: &[u8], fds: &[BorrowedFd<'_>]) -> UnixStream {
    let stream = UnixStream::connect(server.path()).unwrap();
    let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // One that was refused early does not hear the rest.
    let _ = rustix::net::sendmsg(
        &stream,
        &[IoSlice::new(text)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    stream
}

fn range(host: u64, size: u64, offset: u64) -> Vec<u8> {
    format!(
        r#"[{{"base_host_virt_addr":{host},"size":{size},"offset":{offset},"page_size":4096,"page_size_kib":4096}}]"#
    )
    .into_bytes()
}

#[test]
fn clients_that_are_no_good_are_sent_away_and_others_served() {
    if !may_serve("clients_that_are_no_good_are_sent_away_and_others_served") {
        return;
    }
    let server = Server::new(packed(), Serving::default());
    let (_connection, ram) = server.guest();
    let (pipe, _other) = std::io::pipe().unwrap();
    let fd = pipe.as_fd();
    let good = range(0x10_0000, PAGE, 0);
    let long = [b"[".as_slice(), &[b' '; 70_000]].concat();
    for (text, fds, part) in [
        (&good, vec![], "no userfaultfd with"),
        (&good, vec![fd], "is no userfaultfd"),
        (&good, vec![fd, fd], "more than one descriptor"),
        (&good, vec![fd; 8], "descriptor"),
        (&b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![], "understood"),
        (&long, vec![fd], "longer than 65536"),
        (
            &range(0x10_0000, 2 * PAGES * PAGE, 0),
            vec![fd],
            "another guest's",
        ),
        (
            &range(0x10_0000, PAGE, PAGES * PAGE),
            vec![fd],
            "another guest's",
        ),
        (&range(0x10_0001, PAGE, 0), vec![fd], "whole pages"),
    ] {
        server.said.lock().unwrap().clear();
        let mut stream = say(&server, text, &fds);
        let mut rest = Vec::new();
        // It hangs up; where it has not read all, by a reset.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
        server.says(part);
    }
    // One that says half and stays, and one that leaves, are no concern of others.
    let mut half = say(&server, &good[..20], &[]);
    drop(say(&server, b"[", &[]));
    for page in 0..PAGES {
        check(&ram, page);
    }
    half.write_all(b" ").unwrap();
    let (_connection, ram) = server.guest();
    check(&ram, 3);
}

/// A descriptor's flags are those of all who have it.
#[test]
fn a_userfaultfd_whose_reading_waits_keeps_nobody_waiting() {
    if !may_serve("a_userfaultfd_whose_reading_waits_keeps_nobody_waiting") {
        return;
    }
    let server = Server::new(packed(), Serving::default());
    // SAFETY: plain numbers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    // SAFETY: it was just made and belongs to nobody else.
    let uffd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) };
    let mut api = [0xaa_u64, 0, 0];
    // SAFETY: UFFDIO_API with its structure of three words.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc018_aa3f_u64 as _, api.as_mut_ptr()) };
    assert_eq!(done, 0);
    let mut stream = say(&server, &range(0x10_0000, PAGE, 0), &[uffd.as_fd()]);
    let (_connection, ram) = server.guest();
    check(&ram, 3);
    rustix::fs::fcntl_setfl(&uffd, rustix::fs::OFlags::empty()).unwrap();
    check(&ram, PAGES - 1);
    server.says("cannot be waited for");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    check(&ram, 500);
}

#[test]
fn sizes_that_are_no_sizes_of_pages_are_refused() {
    for at_once_bytes in [0, 100, 2048, 12288, 2 << 20] {
        let serving = Serving {
            at_once_bytes,
            ..Serving::default()
        };
        let server = Server::new(plain(), serving);
        let result = server.result.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(result, Err(ServeError::AtOnce(b)) if b == at_once_bytes));
    }
}
