//! The program that goes into the jail: whether it can be started there at all, told before anything is made.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::failure::{Failure, OrFail};

/// What is made beside the program at the jail's root, which it must not be called.
const TAKEN: [&str; 2] = ["dev", "run"];
/// Ends the name of the file with the process number.
pub(crate) const PID_SUFFIX: &str = ".pid";
/// Longest name of a file (Linux `NAME_MAX`), with room for that.
const MAX_NAME_BYTES: usize = 255 - PID_SUFFIX.len();
/// Longest first line of a script that the kernel reads (Linux `BINPRM_BUF_SIZE`).
const MAX_SCRIPT_LINE: usize = 256;
/// Longest path of an interpreter (Linux `PATH_MAX`).
const MAX_INTERPRETER_BYTES: u64 = 4096;
/// Most program headers that are looked through; programs have a dozen.
const MAX_PROGRAM_HEADERS: u16 = 256;

/// `e_machine` of programs for this machine (ELF gABI).
const MACHINE: u16 = if cfg!(target_arch = "aarch64") {
    183
} else {
    62
};

/// The file that `--exec-file` names, open.
#[derive(Debug)]
pub(crate) struct Program {
    /// Without links.
    pub(crate) path: PathBuf,
    /// Its own name, by which the jail is called.
    pub(crate) name: OsString,
    pub(crate) file: File,
    /// Rights of the copy.
    pub(crate) mode: u32,
    /// Another program that the kernel starts in its place, which must then be in the jail, too.
    pub(crate) interpreter: Option<PathBuf>,
}

impl Program {
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let act = || format!("take --exec-file {path:?} into the jail");
        let wrong = |why: &str, cure: &str| Failure::new(act(), why, cure);
        let real = fs::canonicalize(path).or_fail(act, "is the path right?")?;
        let name = real.file_name().unwrap_or_default().to_owned();
        // Before it is opened: opening a device may do something.
        if !fs::symlink_metadata(&real)
            .or_fail(act, "is the path right?")?
            .is_file()
        {
            return Err(wrong("it is not a file", "name the program itself"));
        }
        check_name(&name).map_err(|why| wrong(&why, "rename the program"))?;
        let file = File::options()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&real)
            .or_fail(act, "may it be read?")?;
        let facts = file.metadata().or_fail(act, "is its disk well?")?;
        let mode = facts.mode() & 0o777;
        if !facts.is_file() {
            return Err(wrong("it is not a file", "name the program itself"));
        }
        if mode & 0o100 == 0 {
            return Err(wrong(
                "its owner may not execute it",
                "chmod u+x it, if it is a program",
            ));
        }
        let interpreter = interpreter(&file)
            .or_fail(act, "is its disk well?")?
            .map_err(|why| wrong(&why, "give a program for this machine, such as alveole-vmm"))?;
        Ok(Self {
            path: real,
            name,
            file,
            mode,
            interpreter,
        })
    }
}

fn check_name(name: &OsStr) -> Result<(), String> {
    if TAKEN.iter().any(|taken| name == *taken) {
        return Err(format!("the jail has a folder {name:?} of its own"));
    }
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(format!(
            "its name has {} bytes, {MAX_NAME_BYTES} are the most",
            name.len()
        ));
    }
    Ok(())
}

/// What must be there for the kernel to start the file: nothing else, for a static program. Or why it is none.
fn interpreter(file: &File) -> io::Result<Result<Option<PathBuf>, String>> {
    let mut head = [0; MAX_SCRIPT_LINE];
    let length = read_at_most(file, &mut head, 0)?;
    let head = &head[..length];
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next().unwrap_or_default();
        let mut words = line
            .split(|b| *b == b' ' || *b == b'\t')
            .filter(|w| !w.is_empty());
        return Ok(match words.next() {
            Some(word) => Ok(Some(OsStr::from_bytes(word).into())),
            None => Err("it is a script that names no interpreter".into()),
        });
    }
    if length < 64 || !head.starts_with(b"\x7fELF") {
        return Ok(Err("it is no ELF program".into()));
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    // 64-bit, little-endian; an executable or a position-independent one.
    if head[4..6] != [2, 1] || !matches!(u16_at(16), 2 | 3) || u16_at(18) != MACHINE {
        return Ok(Err("it is an ELF file for something else".into()));
    }
    let mut headers_at = [0; 8];
    headers_at.copy_from_slice(&head[32..40]);
    let headers_at = u64::from_le_bytes(headers_at);
    let (size, count) = (u16_at(54), u16_at(56));
    if size != 56 || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Ok(Err(format!(
            "its ELF header is damaged ({count} program headers of {size} bytes)"
        )));
    }
    for index in 0..u64::from(count) {
        let mut header = [0; 56];
        let Some(at) = headers_at.checked_add(index * u64::from(size)) else {
            return Ok(Err("its ELF header is damaged".into()));
        };
        if read_at_most(file, &mut header, at)? < header.len() {
            return Ok(Err("it is cut short".into()));
        }
        // PT_INTERP
        if header[..4] != 3_u32.to_le_bytes() {
            continue;
        }
        let field = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (at, bytes) = (field(8), field(32));
        if bytes > MAX_INTERPRETER_BYTES {
            return Ok(Err("its ELF header is damaged".into()));
        }
        let mut path = vec![0; bytes as usize];
        let length = read_at_most(file, &mut path, at)?;
        path.truncate(length);
        let path = path.split(|b| *b == 0).next().unwrap_or_default();
        return Ok(Ok(Some(OsStr::from_bytes(path).into())));
    }
    Ok(Ok(None))
}

/// Fills `into` as far as the file goes; says how far that is.
fn read_at_most(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Offsets from a hostile header.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn refused(path: &Path) -> String {
        Program::open(path).unwrap_err().to_string()
    }

    fn write(path: &Path, bytes: &[u8]) {
        fs::write(path, bytes).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// An ELF header with one program header of this type, at this place.
    fn elf(kind: u32, place: u64, machine: u16) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2, 0]);
        file.extend(machine.to_le_bytes());
        file.resize(32, 0);
        file.extend(place.to_le_bytes());
        file.resize(54, 0);
        file.extend([56, 0, 1, 0]);
        file.resize(64, 0);
        file.extend(kind.to_le_bytes());
        file.resize(72, 0);
        file.extend(200_u64.to_le_bytes());
        file.resize(96, 0);
        file.extend(12_u64.to_le_bytes());
        file.resize(200, 0);
        file.extend(b"/lib/loader\0");
        file
    }

    #[test]
    fn programs_say_what_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = dir.path().join("vmm");
        let of = |bytes: &[u8]| {
            write(&vmm, bytes);
            Program::open(&vmm).unwrap().interpreter
        };
        assert_eq!(of(&elf(1, 64, MACHINE)), None);
        assert_eq!(of(&elf(3, 64, MACHINE)), Some("/lib/loader".into()));
        assert_eq!(of(b"#! /bin/sh -e\necho"), Some("/bin/sh".into()));
        assert_eq!(of(b"#!sh"), Some("sh".into()));
        // Ours are static: the kernel starts them where there is nothing else.
        let ours = std::env::current_exe().unwrap();
        assert_eq!(Program::open(&ours).unwrap().interpreter, None);
    }

    #[test]
    fn a_link_is_followed_to_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = dir.path().join("vmm");
        write(&vmm, &elf(1, 64, MACHINE));
        let link = dir.path().join("link");
        symlink("vmm", &link).unwrap();
        let program = Program::open(&link).unwrap();
        assert_eq!(program.name, "vmm");
        assert_eq!(program.path, fs::canonicalize(&vmm).unwrap());
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        let said = refused(&dir.path().join("dangling"));
        assert!(
            said.contains("dangling") && said.contains("No such file"),
            "{said}"
        );
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(refused(&dir.path().join("loop")).contains("symbolic links"));
    }

    #[test]
    fn what_cannot_be_started_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let far = elf(3, u64::MAX - 8, MACHINE);
        let mut many = elf(1, 64, MACHINE);
        many[56..58].copy_from_slice(&[255, 255]);
        let short = &elf(1, 64, MACHINE)[..70];
        for (name, bytes, want) in [
            ("empty", &b""[..], "no ELF program"),
            ("text", b"echo", "no ELF program"),
            ("other", &elf(1, 64, 40), "for something else"),
            ("far", &far, "cut short"),
            ("many", &many, "damaged"),
            ("short", short, "cut short"),
            ("bare", b"#!  \n", "names no interpreter"),
            ("dev", &elf(1, 64, MACHINE), "folder \"dev\" of its own"),
        ] {
            write(&at(name), bytes);
            let said = refused(&at(name));
            assert!(said.contains(want) && said.contains(name), "{said}");
        }
        fs::set_permissions(at("text"), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(refused(&at("text")).contains("chmod u+x"));
        assert!(refused(dir.path()).contains("it is not a file"));
        assert!(refused(Path::new("/dev/null")).contains("it is not a file"));
        assert!(refused(Path::new("/nonexistent/vmm")).contains("/nonexistent/vmm"));
        let long = at(&"v".repeat(255));
        write(&long, &elf(1, 64, MACHINE));
        assert!(refused(&long).contains("255 bytes, 251 are the most"));
    }

    #[test]
    fn every_header_is_borne() {
        let dir = tempfile::tempdir().unwrap();
        let good = elf(3, 64, MACHINE);
        for at in 0..120 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let path = dir.path().join("vmm");
                write(&path, &bytes);
                let _ = Program::open(&path);
            }
        }
    }
}
