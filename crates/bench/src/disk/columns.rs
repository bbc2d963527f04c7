//! The columns of the table with a guest: every VMM in every way that a disk can be given to it.
//!
//! Does not know what the guest does with the disk.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};

use crate::attempts::Attempts;
use crate::machine::{Device, Machine};
use crate::vmm::{Kind, Vmm};

/// What stands between guest and medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cache {
    /// The host's page cache.
    Buffered,
    /// Nothing.
    Direct,
}

/// Who does the jobs of a column.
#[derive(Debug)]
pub(super) enum Who {
    /// fio on the host, on the image itself.
    Host,
    /// fio in a guest of this VMM.
    Guest(Vmm),
}

/// What is read off a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    KiloIops,
    MegaBytes,
    Median,
    Slowest,
    Cpu,
}

impl Measure {
    pub(super) const ALL: [Self; 5] = [
        Self::KiloIops,
        Self::MegaBytes,
        Self::Median,
        Self::Slowest,
        Self::Cpu,
    ];

    /// The name in JSON, and the title.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::KiloIops => ("kiops", "Thousand IOPS"),
            Self::MegaBytes => ("mb_s", "MB/s"),
            Self::Median => ("p50_us", "p50 latency, µs"),
            Self::Slowest => ("p99_us", "p99 latency, µs"),
            Self::Cpu => (
                "cpu_s_per_100k",
                "CPU seconds of the process for 100 k I/Os",
            ),
        }
    }

    pub(super) fn is_cost(self) -> bool {
        matches!(self, Self::Median | Self::Slowest | Self::Cpu)
    }
}

/// After so many failures in a row a column is left alone.
const MOST_FAILURES_IN_A_ROW: u32 = 2;

/// One column.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) who: Who,
    pub(super) cache: Cache,
    /// Firecracker's word for who carries requests.
    engine: Option<&'static str>,
    /// The disk is a qcow2 overlay over the image, which the guest first writes once.
    pub(super) overlay: bool,
    /// More words for the command line.
    words: Vec<String>,
    pub(super) samples: BTreeMap<(usize, Measure), Vec<f64>>,
    pub(super) attempts: Attempts,
}

impl Column {
    fn new(name: String, who: Who, cache: Cache) -> Self {
        Self {
            name,
            who,
            cache,
            engine: None,
            overlay: false,
            words: Vec::new(),
            samples: BTreeMap::new(),
            attempts: Attempts::new(MOST_FAILURES_IN_A_ROW),
        }
    }

    pub(super) fn is_ours(&self) -> bool {
        matches!(&self.who, Who::Guest(vmm) if vmm.kind == Kind::Alveole)
    }

    pub(super) fn is_peer(&self) -> bool {
        matches!(&self.who, Who::Guest(vmm) if vmm.kind != Kind::Alveole)
    }
}

/// All columns for these VMMs: ours by PCI and by MMIO, and for each set of words (`variants`, NAME=WORDS);
/// peers as they are. A peer whose name ends in `-pci` has its disk on PCI. In a smoke run ours alone, by PCI
/// and buffered.
///
/// # Errors
/// A variant is not NAME=WORDS.
pub(super) fn columns(
    vmms: Vec<Vmm>,
    options: &[String],
    variants: &[String],
    host: bool,
    smoke: bool,
) -> anyhow::Result<Vec<Column>> {
    // As `alveole run` gives disks to guests, and as `alveole-vmm` does if not told otherwise.
    let mut sets = vec![
        ("-pci".to_owned(), vec!["--enable-pci".to_owned()]),
        ("-mmio".to_owned(), Vec::new()),
    ];
    if smoke {
        sets.truncate(1);
    }
    for text in variants {
        let (name, words) = text
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .with_context(|| format!("--variant {text}: not NAME=WORDS"))?;
        let words = words.split_whitespace().map(str::to_owned).collect();
        sets.push((format!("-{name}"), words));
    }
    let caches: &[(Cache, &str)] = if smoke {
        &[(Cache::Buffered, "writeback")]
    } else {
        &[(Cache::Buffered, "writeback"), (Cache::Direct, "direct")]
    };
    let mut columns = Vec::new();
    for vmm in vmms {
        let guest = |title: &str, cache| {
            let name = format!("{} {title}", vmm.name);
            Column::new(name, Who::Guest(vmm.clone()), cache)
        };
        match vmm.kind {
            Kind::Alveole => {
                for (set, words) in &sets {
                    let mut ours = Vec::new();
                    for &(cache, title) in caches {
                        ours.push(guest(title, cache));
                    }
                    ours.push(Column {
                        overlay: true,
                        ..guest("qcow2 overlay", Cache::Buffered)
                    });
                    for column in &mut ours {
                        column.name = column.name.replacen(' ', &format!("{set} "), 1);
                        column.words = options.iter().chain(words).cloned().collect();
                    }
                    columns.extend(ours);
                }
            }
            Kind::Firecracker => {
                for engine in ["Sync", "Async"] {
                    columns.push(Column {
                        engine: Some(engine),
                        ..guest(engine, Cache::Buffered)
                    });
                }
            }
            Kind::Qemu | Kind::CloudHypervisor => {
                columns.extend(caches.iter().map(|&(cache, title)| guest(title, cache)));
            }
        }
    }
    if host {
        for (cache, title) in [
            (Cache::Buffered, "host buffered"),
            (Cache::Direct, "host direct"),
        ] {
            columns.push(Column::new(title.to_owned(), Who::Host, cache));
        }
    }
    if columns.is_empty() {
        bail!("there is nothing to measure in a guest");
    }
    Ok(columns)
}

impl Column {
    /// The words with which `vmm` of this column runs `machine`.
    ///
    /// # Errors
    /// See [`Machine::arguments`].
    pub(super) fn arguments(
        &self,
        vmm: &Vmm,
        machine: &Machine,
        dir: &Path,
    ) -> anyhow::Result<Vec<OsString>> {
        let mut words = machine.arguments(vmm, dir)?;
        words.extend(self.words.iter().map(OsString::from));
        Ok(words)
    }

    /// The disk of this column.
    pub(super) fn disk(&self, path: &Path) -> Device {
        Device::Disk {
            path: path.to_path_buf(),
            direct: self.cache == Cache::Direct,
            qcow2: self.overlay,
            engine: self.engine,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn vmm(name: &str, kind: Kind) -> Vmm {
        Vmm {
            name: name.into(),
            kind,
            path: "/x".into(),
            version: "1".into(),
            without_arch_capabilities: false,
        }
    }

    #[test]
    fn every_vmm_gets_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let vmms = vec![
            vmm("alveole", Kind::Alveole),
            vmm("firecracker-pci", Kind::Firecracker),
            vmm("cloud-hypervisor", Kind::CloudHypervisor),
            vmm("qemu", Kind::Qemu),
            vmm("qemu-pci", Kind::Qemu),
        ];
        let variants = ["x=--enable-pci --x".to_owned()];
        let all = columns(vmms, &["--always".into()], &variants, true, false).unwrap();
        let said: BTreeMap<_, _> = all
            .iter()
            .filter_map(|column| {
                let Who::Guest(vmm) = &column.who else {
                    return None;
                };
                let machine = Machine {
                    kernel: "/k".into(),
                    initrd: "/i".into(),
                    device: column.disk(Path::new("/d")),
                    memory_mib: 512,
                    cpus: 1,
                    line: "console=x".into(),
                };
                let words = column.arguments(vmm, &machine, dir.path()).unwrap();
                let mut text = words.join(" ".as_ref()).into_string().unwrap();
                text += &fs::read_to_string(dir.path().join("machine.json")).unwrap_or_default();
                assert!(text.contains("/d") && text.contains("console=x"), "{text}");
                Some((column.name.as_str(), text))
            })
            .collect();
        for (name, want) in [
            ("alveole-mmio writeback", "\"Writeback\""),
            ("alveole-mmio direct", "\"Direct\""),
            ("alveole-pci qcow2 overlay", "\"qcow2\""),
            ("alveole-pci direct", "--always --enable-pci"),
            ("alveole-x direct", "--always --enable-pci --x"),
            ("firecracker-pci Async", "--enable-pci"),
            ("firecracker-pci Sync", "\"Sync\""),
            ("cloud-hypervisor direct", "direct=on"),
            ("qemu direct", "cache=none,aio=io_uring"),
            ("qemu-pci writeback", "virtio-blk-pci"),
        ] {
            assert!(
                said[name].contains(want),
                "{name}: {want} in {}",
                said[name]
            );
        }
        assert!(!said["alveole-mmio direct"].contains("--enable-pci"));
        assert_eq!(all.len(), 9 + 2 + 2 + 2 + 2 + 2);
        assert!(columns(Vec::new(), &[], &["=x".into()], true, false).is_err());
    }
}
