//! `--disk PATH[,option]...`: a disk in one word.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use alveole_vm_config::{BackingPlace, CacheType, DiskFormat, Drive, IoEngine};

const EXPECTED: &str = "write PATH[,ro][,data][,cache=writeback|direct|unsafe][,engine=io_uring|sync]\
                        [,format=raw|qcow2][,backing=beside|anywhere][,queues=N][,serial=TEXT][,id=NAME]";

/// One disk as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    drive: Drive,
    /// Not the one to boot from, even if it is the first.
    data: bool,
    /// A name was given.
    named: bool,
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let path = words.next().unwrap_or_default();
        if path.is_empty() {
            return Err(format!("it names no image; {EXPECTED}"));
        }
        let mut disk = Self {
            drive: Drive {
                path_on_host: PathBuf::from(path),
                cache_type: CacheType::Writeback,
                ..Drive::default()
            },
            data: false,
            named: false,
        };
        for word in words {
            disk.option(word)?;
        }
        Ok(disk)
    }
}

impl Disk {
    fn option(&mut self, word: &str) -> Result<(), String> {
        let drive = &mut self.drive;
        match word.split_once('=') {
            None if word == "ro" => drive.is_read_only = true,
            None if word == "data" => self.data = true,
            Some(("cache", "writeback")) => drive.cache_type = CacheType::Writeback,
            Some(("cache", "direct")) => drive.cache_type = CacheType::Direct,
            Some(("cache", "unsafe")) => drive.cache_type = CacheType::Unsafe,
            Some(("engine", "io_uring")) => drive.io_engine = Some(IoEngine::Async),
            Some(("engine", "sync")) => drive.io_engine = Some(IoEngine::Sync),
            Some(("format", "raw")) => drive.format = Some(DiskFormat::Raw),
            Some(("format", "qcow2")) => drive.format = Some(DiskFormat::Qcow2),
            Some(("backing", "beside")) => drive.backing = Some(BackingPlace::Beside),
            Some(("backing", "anywhere")) => drive.backing = Some(BackingPlace::Anywhere),
            Some(("queues", number)) => {
                let queues = number.parse().ok().filter(|n| *n > 0);
                let refusal = || format!("{number:?} is no number of queues; {EXPECTED}");
                drive.num_queues = Some(queues.ok_or_else(refusal)?);
            }
            Some(("serial", text)) if !text.is_empty() => drive.serial = Some(text.to_owned()),
            Some(("id", name)) if !name.is_empty() => {
                drive.drive_id = name.to_owned();
                self.named = true;
            }
            _ => return Err(format!("{word:?} is no option of a disk; {EXPECTED}")),
        }
        Ok(())
    }
}

impl Disk {
    /// What it was named by.
    pub(crate) fn path(&self) -> &Path {
        &self.drive.path_on_host
    }

    /// The image, if the guest may write to it.
    pub(crate) fn written(&self) -> Option<&Path> {
        (!self.drive.is_read_only).then_some(&self.drive.path_on_host)
    }
}

/// The disks of a machine: the first is the root device unless it says otherwise; those without a name
/// get that of their place.
pub(crate) fn drives(disks: &[Disk]) -> Vec<Drive> {
    let places = disks.iter().enumerate();
    places
        .map(|(at, disk)| {
            let mut drive = disk.drive.clone();
            drive.is_root_device = at == 0 && !disk.data;
            if !disk.named {
                drive.drive_id = format!("disk{at}");
            }
            drive
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> Drive {
        drives(&[text.parse().unwrap()]).remove(0)
    }

    #[test]
    fn a_path_is_enough() {
        let drive = disk("a b.img");
        assert_eq!(drive.path_on_host, PathBuf::from("a b.img"));
        assert_eq!(drive.drive_id, "disk0");
        assert!(drive.is_root_device && !drive.is_read_only);
        assert_eq!(drive.cache_type, CacheType::Writeback);
        assert_eq!(
            (drive.format, drive.io_engine, drive.num_queues),
            (None, None, None)
        );
    }

    #[test]
    fn every_option_counts() {
        let drive =
            disk("x,ro,data,cache=direct,engine=sync,format=qcow2,backing=anywhere,queues=4,id=y");
        assert_eq!(
            drive,
            Drive {
                drive_id: "y".into(),
                path_on_host: "x".into(),
                is_read_only: true,
                cache_type: CacheType::Direct,
                io_engine: Some(IoEngine::Sync),
                format: Some(DiskFormat::Qcow2),
                backing: Some(BackingPlace::Anywhere),
                num_queues: Some(4),
                ..Drive::default()
            }
        );
        assert_eq!(disk("x,backing=beside").backing, Some(BackingPlace::Beside));
        let two: Vec<_> = drives(&["a".parse().unwrap(), "b".parse().unwrap()]);
        assert!(two[0].is_root_device && !two[1].is_root_device);
        assert_eq!(two[1].drive_id, "disk1");
    }

    #[test]
    fn a_refusal_says_what_to_write() {
        for text in [
            "",
            ",ro",
            "x,rw",
            "x,cache=fast",
            "x,engine=aio",
            "x,format=vhd",
            "x,backing=/etc",
            "x,queues=0",
            "x,queues=many",
            "x,id=",
            "x,",
        ] {
            let refusal = text.parse::<Disk>().unwrap_err();
            assert!(refusal.contains("write PATH[,ro]"), "{text}: {refusal}");
        }
    }
}
