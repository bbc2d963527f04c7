//! The columns of the table with a guest: every VMM in every way that a disk can be given to it. The only
//! place that knows how to say "disk" to each.
//!
//! Does not know what the guest does with the disk.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::json;

use crate::vmm::{Kind, Vmm, utf8};

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
    pub(super) attempts: u32,
    pub(super) failures: Vec<String>,
    in_a_row: u32,
}

/// The guest as its VMM needs to know it.
pub(super) struct Guest {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) disk: PathBuf,
    pub(super) memory_mib: u64,
    pub(super) cpus: u32,
    pub(super) line: String,
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
            attempts: 0,
            failures: Vec::new(),
            in_a_row: 0,
        }
    }

    pub(super) fn is_ours(&self) -> bool {
        matches!(&self.who, Who::Guest(vmm) if vmm.kind == Kind::Alveole)
    }

    pub(super) fn is_peer(&self) -> bool {
        matches!(&self.who, Who::Guest(vmm) if vmm.kind != Kind::Alveole)
    }

    pub(super) fn given_up(&self) -> bool {
        self.in_a_row >= MOST_FAILURES_IN_A_ROW
    }

    pub(super) fn note(&mut self, outcome: Result<(), String>) {
        self.attempts += 1;
        match outcome {
            Ok(()) => self.in_a_row = 0,
            Err(what) => {
                self.in_a_row += 1;
                self.failures.push(what);
            }
        }
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
    /// The words with which `vmm` of this column runs `guest`, its console on stdout. Writes the files that
    /// it reads to `dir`.
    ///
    /// # Errors
    /// A file cannot be written, a path fits no command line.
    pub(super) fn arguments(
        &self,
        vmm: &Vmm,
        guest: &Guest,
        dir: &Path,
    ) -> anyhow::Result<Vec<OsString>> {
        let (kernel, initrd) = (utf8(&guest.kernel)?, utf8(&guest.initrd)?);
        let (disk, line) = (utf8(&guest.disk)?, &guest.line);
        let (cpus, memory) = (guest.cpus, guest.memory_mib);
        let direct = self.cache == Cache::Direct;
        let pci = vmm.name.ends_with("-pci");
        let mut words: Vec<String> = match vmm.kind {
            Kind::Alveole | Kind::Firecracker => {
                let mut drive = json!({
                    "drive_id": "bench", "path_on_host": disk, "is_root_device": false,
                    "is_read_only": false,
                });
                // Firecracker's way past the page cache there is not. Its default offers no flush.
                if vmm.kind == Kind::Alveole {
                    drive["cache_type"] = if direct { "Direct" } else { "Writeback" }.into();
                    drive["format"] = if self.overlay { "qcow2" } else { "raw" }.into();
                }
                if let Some(engine) = self.engine {
                    drive["io_engine"] = engine.into();
                }
                let config = json!({
                    "boot-source": {
                        "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": line,
                    },
                    "drives": [drive],
                    "machine-config": { "vcpu_count": cpus, "mem_size_mib": memory },
                });
                let file = dir.join("machine.json");
                fs::write(&file, config.to_string())
                    .with_context(|| format!("cannot write {}", file.display()))?;
                let file = utf8(&file)?;
                let text = if vmm.kind == Kind::Alveole {
                    format!("--no-api\n--console\nstdio\n--config-file\n{file}")
                } else {
                    let pci = if pci { "\n--enable-pci" } else { "" };
                    format!("--no-api\n--level\nError\n--config-file\n{file}{pci}")
                };
                lines(&text)
            }
            Kind::CloudHypervisor => lines(&format!(
                "--kernel\n{kernel}\n--initramfs\n{initrd}\n--cmdline\n{line}\n--cpus\nboot={cpus}\n\
                 --memory\nsize={memory}M\n--serial\ntty\n--console\noff\n--disk\n\
                 path={disk},image_type=raw,direct={}",
                if direct { "on" } else { "off" }
            )),
            Kind::Qemu => {
                let cpu = if vmm.without_arch_capabilities {
                    "host,-arch-capabilities"
                } else {
                    "host"
                };
                let (machine, device) = if pci {
                    (",pcie=on", "virtio-blk-pci,disable-legacy=on")
                } else {
                    ("", "virtio-blk-device")
                };
                let cache = if direct { "none" } else { "writeback" };
                lines(&format!(
                    "-no-user-config\n-nodefaults\n-display\nnone\n-no-reboot\n-nic\nnone\n\
                     -M\nmicrovm,pit=on,pic=on,rtc=on,isa-serial=on{machine}\n-accel\nkvm\n-cpu\n{cpu}\n\
                     -smp\n{cpus}\n-m\n{memory}\n-kernel\n{kernel}\n-initrd\n{initrd}\n-append\n{line}\n\
                     -global\nvirtio-mmio.force-legacy=false\n-object\niothread,id=io\n\
                     -drive\nif=none,id=disk,file={disk},format=raw,cache={cache},aio=io_uring\n\
                     -device\n{device},drive=disk,iothread=io\n-serial\nstdio"
                ))
            }
        };
        words.extend(self.words.iter().cloned());
        Ok(words.into_iter().map(OsString::from).collect())
    }
}

fn lines(text: &str) -> Vec<String> {
    text.split('\n').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
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
        let guest = Guest {
            kernel: "/k".into(),
            initrd: "/i".into(),
            disk: "/d".into(),
            memory_mib: 512,
            cpus: 1,
            line: "console=x".into(),
        };
        let said: BTreeMap<_, _> = all
            .iter()
            .filter_map(|column| {
                let Who::Guest(vmm) = &column.who else {
                    return None;
                };
                let words = column.arguments(vmm, &guest, dir.path()).unwrap();
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
