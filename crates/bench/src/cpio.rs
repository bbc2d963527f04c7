//! Writes cpio archives of the "newc" kind, which is what Linux unpacks as its initramfs.
//!
//! Knows directories, files and character devices, all root's and without times: the same contents
//! give the same bytes. Does not know what an archive is for.

/// An archive that is being written.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Archive {
    /// Adds a directory. Names are paths without a leading slash; parents come first.
    pub(crate) fn directory(mut self, name: &str, rights: u32) -> Self {
        self.entry(name, DIRECTORY | rights, 2, (0, 0), &[]);
        self
    }

    /// Adds a file.
    pub(crate) fn file(mut self, name: &str, rights: u32, contents: &[u8]) -> Self {
        self.entry(name, FILE | rights, 1, (0, 0), contents);
        self
    }

    /// Adds a character device.
    pub(crate) fn character_device(mut self, name: &str, rights: u32, number: (u32, u32)) -> Self {
        self.entry(name, CHARACTER_DEVICE | rights, 1, number, &[]);
        self
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), contents: &[u8]) {
        let size = u32::try_from(contents.len()).unwrap_or_else(|_| panic!("{name}: over 4 GiB"));
        let name_size = name.len() as u32 + 1;
        let (inode, owner, time, container, check) = (self.entries, 0, 0, 0, 0);
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in [
            inode, mode, owner, owner, links, time, size, container, container, device.0, device.1,
            name_size, check,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        Archive::default()
            .directory("dev", 0o755)
            .character_device("dev/console", 0o600, (5, 1))
            .file("init", 0o755, b"12345")
            .finish()
    }

    #[test]
    fn headers_and_padding() {
        let bytes = sample();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(&bytes[..14], b"07070100000000");
        // Header 110, "dev" and its 0 make 114, padded to 116: the next entry.
        assert_eq!(&bytes[116..122], b"070701");
        let text = String::from_utf8_lossy(&bytes);
        let console = text.find("dev/console").unwrap() - 110;
        assert_eq!(&text[console + 14..console + 22], "00002180");
        assert_eq!(&text[console + 78..console + 94], "0000000500000001");
        let init = text.find("12345").unwrap();
        assert_eq!(init % 4, 0);
        assert!(text.contains("TRAILER!!!"));
    }

    #[test]
    fn the_cpio_command_reads_it() {
        let command = Command::new("cpio")
            .args(["-itv", "--quiet", "-n"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut cpio) = command else {
            eprintln!("SKIPPED: there is no cpio command here");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&sample()).unwrap();
        let said = cpio.wait_with_output().unwrap();
        assert!(said.status.success());
        let said = String::from_utf8(said.stdout).unwrap();
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 3, "{said}");
        assert!(
            lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with("dev"),
            "{said}"
        );
        assert!(
            lines[1].starts_with("crw-------") && lines[1].contains("5,   1"),
            "{said}"
        );
        assert!(
            lines[2].starts_with("-rwxr-xr-x") && lines[2].contains(" 5 "),
            "{said}"
        );
    }
}
