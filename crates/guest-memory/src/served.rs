//! RAM whose pages another process puts in when they are first touched, by userfaultfd(2).
//!
//! The protocol is Firecracker's (its docs/snapshotting/handling-page-faults-on-snapshot-resume.md): the other process listens on a
//! unix socket. It gets one message, a JSON array that says where each range of RAM is mapped and at which offset of the memory file its
//! pages are, and with it the userfaultfd. Nothing else is said on the connection, but it stays open: when it hangs up, the
//! other process is gone.
//!
//! **This process keeps its copy of the userfaultfd for as long as RAM is mapped.** Were the last copy closed, as when the other process
//! dies, Linux would let everybody who waits for a page go on with zeroes: a disk would be written with them. So those who wait
//! do so for ever, and end with this process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::mapping::{Backing, map_ranges};
use crate::{GuestRam, HostPages, MapError, MemoryPlan, PAGE_SIZE};

/// How long [`PageServer::watch_while`] waits altogether. Abused by a server that takes the connection and answers nothing: until a
/// machine is there, nobody else would end the waiting.
const PATIENCE: Duration = Duration::from_secs(30);

/// Linux include/uapi/linux/userfaultfd.h.
pub(crate) mod abi {
    pub(crate) const API: u64 = 0xaa;
    /// Pages that are taken away (madvise(2), `MADV_DONTNEED`) are told of, as Firecracker asks for.
    pub(crate) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
    /// Pages of hugetlbfs can be served.
    pub(crate) const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
    pub(crate) const REGISTER_MODE_MISSING: u64 = 1;
    pub(crate) const IOC_NEW: u64 = 0xaa00;
    pub(crate) const IOC_API: u64 = 0xc018_aa3f;
    pub(crate) const IOC_REGISTER: u64 = 0xc020_aa00;
    pub(crate) const IOC_UNREGISTER: u64 = 0x8010_aa01;
    #[cfg(any(test, feature = "test-server"))]
    pub(crate) const IOC_COPY: u64 = 0xc028_aa03;
    #[cfg(any(test, feature = "test-server"))]
    pub(crate) const EVENT_PAGEFAULT: u8 = 0x12;

    #[repr(C)]
    pub(crate) struct Api {
        pub(crate) api: u64,
        pub(crate) features: u64,
        pub(crate) ioctls: u64,
    }

    #[repr(C)]
    pub(crate) struct Range {
        pub(crate) start: u64,
        pub(crate) len: u64,
    }

    #[repr(C)]
    pub(crate) struct Register {
        pub(crate) range: Range,
        pub(crate) mode: u64,
        pub(crate) ioctls: u64,
    }
}

/// Why RAM cannot be served by another process.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Nobody is there.
    #[error(
        "cannot connect to {path:?}, where a process is to serve guest memory: {source}{}",
        cure(source)
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The address space.
    #[error(transparent)]
    Map(#[from] MapError),
    /// This process may not.
    #[error(
        "cannot have page faults of the hypervisor answered by another process (userfaultfd): {0}; give this process CAP_SYS_PTRACE or access to /dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1"
    )]
    NotAllowed(#[source] io::Error),
    /// The host's kernel is too old.
    #[error("this host's userfaultfd cannot do what is needed: {0}; Linux 4.14 or later can")]
    Features(#[source] io::Error),
    /// A range.
    #[error(
        "cannot register {size_bytes} bytes at guest address {start:#x} with userfaultfd: {source}"
    )]
    Register {
        /// First guest address.
        start: u64,
        /// Length.
        size_bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// It cannot be told.
    #[error("cannot tell the process at {path:?} where guest memory is: {source}")]
    Send {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It went away.
    #[error(
        "the process that serves guest memory at {0:?} is gone; start it anew, and load the snapshot anew"
    )]
    Gone(PathBuf),
    /// It does not answer.
    #[error(
        "the process that serves guest memory at {0:?} has not put in the pages that were asked for within {PATIENCE:?}"
    )]
    Silent(PathBuf),
    /// Nobody can look whether it is there.
    #[error("cannot watch the process that serves guest memory at {path:?}: {source}")]
    Watch {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

fn cure(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            "; there is no such socket: is the path right, and the process started?"
        }
        io::ErrorKind::ConnectionRefused => {
            "; nobody listens there: start the process that serves the memory before the snapshot is loaded"
        }
        io::ErrorKind::PermissionDenied => "; make the socket writable for this user",
        io::ErrorKind::InvalidInput => "; a socket's path has at most 107 bytes",
        _ => "",
    }
}

/// A connection with the process that serves RAM.
#[derive(Debug)]
pub struct PageServer {
    stream: UnixStream,
    path: PathBuf,
}

impl PageServer {
    /// Connects with the process that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ServeError> {
        let stream = UnixStream::connect(path).map_err(|source| ServeError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            stream,
            path: path.to_owned(),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Calls `act`, which may touch `ram`, and returns what that returns. Should the process go away meanwhile, or take too long,
    /// what `act` waits for reads as zeroes, as does all of RAM from then on, and the result is dropped. So only for what
    /// leaves nothing behind but in this process, and before a guest runs.
    ///
    /// # Errors
    /// The process went away; or it took longer than 30 seconds; or the host gives nothing to watch it with.
    pub fn watch_while<T>(&self, ram: &GuestRam, act: impl FnOnce() -> T) -> Result<T, ServeError> {
        let failed = |source| ServeError::Watch {
            path: self.path.clone(),
            source,
        };
        let (ours, watchers) = UnixStream::pair().map_err(failed)?;
        std::thread::scope(|scope| {
            let watcher = std::thread::Builder::new()
                .name("memory".into())
                .spawn_scoped(scope, move || self.watch_until_done(ram, &watchers))
                .map_err(failed)?;
            let result = act();
            drop(ours);
            match watcher.join() {
                Ok(Ok(())) => Ok(result),
                Ok(Err(e)) => Err(e),
                Err(_) => Err(failed(io::Error::other(
                    "the thread that watches it panicked",
                ))),
            }
        })
    }

    fn watch_until_done(&self, ram: &GuestRam, done: &UnixStream) -> Result<(), ServeError> {
        let entry = |fd: RawFd| libc::pollfd {
            fd,
            events: 0,
            revents: 0,
        };
        let mut fds = [entry(self.stream.as_raw_fd()), entry(done.as_raw_fd())];
        let patience = i32::try_from(PATIENCE.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: an array of as many entries as are said. Hang-ups are always told of.
        let got = unsafe { libc::poll(fds.as_mut_ptr(), 2, patience) };
        let [server, done] = fds.map(|entry| entry.revents != 0);
        let path = || self.path.clone();
        let why = match got {
            0 => ServeError::Silent(path()),
            _ if server => ServeError::Gone(path()),
            _ if done => return Ok(()),
            _ => ServeError::Watch {
                path: path(),
                source: io::Error::last_os_error(),
            },
        };
        ram.stop_being_served();
        Err(why)
    }

    fn send(&self, ram: &GuestRam, uffd: BorrowedFd<'_>) -> io::Result<()> {
        let mut offset = 0;
        let page_size = ram.host_pages().size_bytes();
        let ranges = ram.mapped_ranges().map(|(range, host_addr)| {
            let size = range.size_bytes;
            let at = offset;
            offset += size;
            // `page_size_kib` is in bytes, too: a mistake that Firecracker's clients have come to rely upon.
            format!(
                r#"{{"base_host_virt_addr":{host_addr},"size":{size},"offset":{at},"page_size":{page_size},"page_size_kib":{page_size}}}"#
            )
        });
        let text = format!("[{}]", ranges.collect::<Vec<_>>().join(","));
        let mut sent = 0;
        while sent < text.len() {
            // The descriptor goes with the first byte.
            let fd = (sent == 0).then_some(uffd);
            sent += send_with(&self.stream, &text.as_bytes()[sent..], fd)?;
        }
        Ok(())
    }
}

impl AsFd for PageServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for PageServer {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl GuestRam {
    /// Maps RAM whose pages are put in by the process behind `server`, each when it is first touched, at the offsets that a
    /// memory file of all of RAM has. Whoever touches a page waits for that. The process is told how large `pages` are, and puts
    /// in whole ones.
    ///
    /// # Errors
    /// As [`GuestRam::map_of`]; this process may not use userfaultfd; the other process cannot be told.
    pub fn map_served(
        plan: &MemoryPlan,
        server: &PageServer,
        pages: HostPages,
    ) -> Result<Self, ServeError> {
        let mut features = abi::FEATURE_EVENT_REMOVE;
        let backing = match pages {
            // Of a transparent huge page the server would have to bring all 512 small ones, or none.
            HostPages::Anonymous => Backing::Small,
            HostPages::Huge2M => {
                features |= abi::FEATURE_MISSING_HUGETLBFS;
                Backing::Hugetlb
            }
        };
        let map = map_ranges(plan, backing)?;
        let uffd = open_userfaultfd()?;
        let mut api = abi::Api {
            api: abi::API,
            features,
            ioctls: 0,
        };
        ioctl(&uffd, abi::IOC_API, &mut api).map_err(ServeError::Features)?;
        let ram = Self::of_map(map, pages, Some(uffd));
        let Some(uffd) = ram.served_by() else {
            return Ok(ram);
        };
        for (range, host_addr) in ram.mapped_ranges() {
            let mut register = abi::Register {
                range: abi::Range {
                    start: host_addr,
                    len: range.size_bytes,
                },
                mode: abi::REGISTER_MODE_MISSING,
                ioctls: 0,
            };
            ioctl(uffd, abi::IOC_REGISTER, &mut register).map_err(|source| {
                ServeError::Register {
                    start: range.start,
                    size_bytes: range.size_bytes,
                    source,
                }
            })?;
        }
        server
            .send(&ram, uffd.as_fd())
            .map_err(|source| ServeError::Send {
                path: server.path.clone(),
                source,
            })?;
        Ok(ram)
    }

    /// Has all pages that are not there yet read as zeroes, and lets those who wait for one go on: for when nobody is left who could do
    /// anything with them. Nothing to do where nobody serves RAM.
    pub fn stop_being_served(&self) {
        let Some(uffd) = self.served_by() else { return };
        for (range, host_addr) in self.mapped_ranges() {
            let mut range = abi::Range {
                start: host_addr,
                len: range.size_bytes,
            };
            // It was registered, which is all that this can fail of.
            let _ = ioctl(uffd, abi::IOC_UNREGISTER, &mut range);
        }
    }

    /// Touches pages so that they are there: a forked child would find zeroes instead, as userfaultfd is not inherited (Linux
    /// fs/userfaultfd.c, `dup_userfaultfd`). Nothing to do where nobody serves RAM.
    pub(crate) fn bring_in(&self, pages: &crate::PageSet) {
        if self.served_by().is_none() {
            return;
        }
        for run in pages.runs() {
            for (pages, host_addr) in self.host_pieces(&run) {
                for page in 0..pages.end - pages.start {
                    let addr = host_addr + page * PAGE_SIZE;
                    // SAFETY: a byte of a page that is mapped; any value is one.
                    let _ = unsafe { (addr as *const u8).read_volatile() };
                }
            }
        }
    }
}

/// A userfaultfd that is told of the kernel's own faults, too, as those of a processor in a guest are.
pub(crate) fn open_userfaultfd() -> Result<OwnedFd, ServeError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: plain numbers.
    let got = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let mut refused = io::Error::last_os_error();
    if let Ok(fd @ 0..) = RawFd::try_from(got) {
        // SAFETY: it was just made and belongs to nobody else.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    if let Ok(device) = std::fs::File::open("/dev/userfaultfd") {
        // SAFETY: the argument is a number, not an address.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), abi::IOC_NEW as _, flags) };
        if fd >= 0 {
            // SAFETY: as above.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        refused = io::Error::last_os_error();
    }
    Err(ServeError::NotAllowed(refused))
}

pub(crate) fn ioctl<T>(uffd: &OwnedFd, request: u64, argument: &mut T) -> io::Result<()> {
    // SAFETY: every request of `abi` is called with the structure that belongs to it, which lives until the call returns.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends bytes, and with them a descriptor (unix(7), `SCM_RIGHTS`). How many bytes went.
fn send_with(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    const FD_BYTES: u32 = size_of::<RawFd>() as u32;
    /// Aligned as a control message must be.
    #[repr(C, align(8))]
    struct Room([u8; 32]);
    let mut room = Room([0; 32]);
    let mut iovec = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a message header of zeroes is valid: no name, no range, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iovec;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        message.msg_control = (&raw mut room.0).cast();
        // SAFETY: the room is as large as a header and a descriptor need (24 bytes), and aligned, so that the first message is in it.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(FD_BYTES) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(FD_BYTES) as _;
            std::ptr::write_unaligned(libc::CMSG_DATA(header).cast(), fd.as_raw_fd());
        }
    }
    loop {
        // SAFETY: header, range and control data live until the call returns; the kernel only reads them.
        let got =
            unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match usize::try_from(got) {
            Ok(sent) => return Ok(sent),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSet;
    use crate::test_server::{TestServer, may_serve};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixListener;

    /// Every third page has bytes.
    fn page(number: u64) -> Option<Vec<u8>> {
        let byte = if number.is_multiple_of(3) {
            (number % 250) as u8 + 1
        } else {
            0
        };
        Some(vec![byte; PAGE_SIZE as usize])
    }

    fn served(
        bytes: u64,
        pages: impl Fn(u64) -> Option<Vec<u8>> + Send + 'static,
    ) -> (tempfile::TempDir, TestServer, PageServer, GuestRam) {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("u");
        let test = TestServer::start(&path, pages).unwrap();
        let server = PageServer::connect(&path).unwrap();
        let plan = MemoryPlan::around_hole(bytes).unwrap();
        let ram = GuestRam::map_served(&plan, &server, HostPages::Anonymous).unwrap();
        (folder, test, server, ram)
    }

    #[test]
    fn pages_are_those_that_the_server_puts_in() {
        if !may_serve("pages_are_those_that_the_server_puts_in") {
            return;
        }
        let (_folder, test, _server, ram) = served((3 << 30) + (8 << 20), page);
        for (addr, number) in [
            (0, 0),
            (3 * PAGE_SIZE, 3),
            (PAGE_SIZE, 1),
            ((4 << 30) + 2 * PAGE_SIZE, (3 << 18) + 2),
        ] {
            let mut back = vec![0xff; PAGE_SIZE as usize];
            ram.read(addr, &mut back).unwrap();
            assert_eq!(Some(back), page(number), "page {number}");
        }
        ram.write(3 * PAGE_SIZE + 1, &[9]).unwrap();
        assert_eq!(
            ram.read_plain::<[u8; 4]>(3 * PAGE_SIZE).unwrap(),
            [4, 9, 4, 4]
        );
        assert_eq!(test.served(), 4);
        let told: serde_json::Value = serde_json::from_str(&test.message()).unwrap();
        let hosts: Vec<_> = ram.mapped_ranges().map(|(_, host)| host).collect();
        assert_eq!(
            told,
            serde_json::json!([
                { "base_host_virt_addr": hosts[0], "size": 3u64 << 30, "offset": 0, "page_size": 4096, "page_size_kib": 4096 },
                { "base_host_virt_addr": hosts[1], "size": 8 << 20, "offset": 3u64 << 30, "page_size": 4096, "page_size_kib": 4096 },
            ])
        );
    }

    /// What nobody has touched is not there, and is not zero all the same; a forked child does not get it from the server.
    #[test]
    fn what_was_never_touched_is_saved_too() {
        if !may_serve("what_was_never_touched_is_saved_too") {
            return;
        }
        let bytes = 8 << 20;
        let count = bytes / PAGE_SIZE;
        let check = |file: &File| {
            for number in 0..count {
                let mut back = vec![0; PAGE_SIZE as usize];
                file.read_exact_at(&mut back, number * PAGE_SIZE).unwrap();
                assert!(Some(back) == page(number), "page {number} differs");
            }
        };
        let all = PageSet::all(count);
        let files: Vec<_> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        let (_folder, test, _server, ram) = served(bytes, page);
        ram.save_pages(&all, &files[0]).unwrap();
        check(&files[0]);
        assert_eq!(test.served(), count);
        let (_folder, _test, _server, ram) = served(bytes, page);
        ram.capture_in_child(&all, &files[1])
            .unwrap()
            .wait()
            .unwrap();
        check(&files[1]);
        let (_folder, _test, _server, ram) = served(bytes, page);
        let mut prepared = ram.prepare_capture(&files[2]).unwrap();
        let first = PageSet::from_runs(count, std::iter::once(0..count / 2)).unwrap();
        let rest = PageSet::from_runs(count, std::iter::once(count / 2..count)).unwrap();
        prepared.write_ahead(&first).unwrap();
        prepared.start(&rest).unwrap().wait().unwrap();
        check(&files[2]);
    }

    #[test]
    fn a_server_that_dies_while_it_is_watched_lets_go_of_who_waits() {
        if !may_serve("a_server_that_dies_while_it_is_watched_lets_go_of_who_waits") {
            return;
        }
        let (_folder, test, server, ram) =
            served(1 << 20, |number| page(number).filter(|_| number == 0));
        let read = |addr| ram.read_plain::<u8>(addr).unwrap();
        assert_eq!(server.watch_while(&ram, || read(0)).unwrap(), 1);
        let killer = std::thread::spawn(move || {
            while test.asked() < 2 {
                std::thread::yield_now();
            }
            test.stop();
        });
        let why = server
            .watch_while(&ram, || read(3 * PAGE_SIZE))
            .unwrap_err();
        assert!(matches!(why, ServeError::Gone(_)), "{why}");
        killer.join().unwrap();
        assert_eq!(read(6 * PAGE_SIZE), 0);
    }

    #[test]
    fn who_cannot_be_connected_with_is_told_with_words() {
        let folder = tempfile::TempDir::new().unwrap();
        let expect = |path: &Path, part: &str| {
            let why = PageServer::connect(path).unwrap_err().to_string();
            assert!(
                why.contains(part) && why.contains(path.to_str().unwrap()),
                "{why}"
            );
        };
        expect(&folder.path().join("none"), "there is no such socket");
        let left = folder.path().join("left");
        drop(UnixListener::bind(&left).unwrap());
        expect(&left, "nobody listens there");
        let plain = folder.path().join("plain");
        File::create(&plain).unwrap();
        expect(&plain, "nobody listens there");
        expect(&folder.path().join("x".repeat(108)), "at most 107 bytes");
    }
}
