//! A guest with one device more, as each VMM's command line says it.
//!
//! Does not know what the guest does with the device.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use crate::vmm::{Kind, Vmm, utf8};

/// The guest as its VMM needs to know it.
pub(crate) struct Machine {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u32,
    pub(crate) line: String,
    pub(crate) device: Device,
}

/// What is measured.
pub(crate) enum Device {
    Disk {
        path: PathBuf,
        direct: bool,
        qcow2: bool,
        /// Firecracker's word for who carries requests.
        engine: Option<&'static str>,
    },
    Tap {
        name: String,
        mac: String,
        /// The host's kernel moves the frames.
        vhost: bool,
        /// Where a unix socket for vsock is to be, for VMMs that make one.
        vsock: PathBuf,
    },
}

impl Device {
    /// The sections of Firecracker's JSON, which ours reads too.
    fn sections(&self, kind: Kind) -> anyhow::Result<Value> {
        Ok(match self {
            Self::Disk {
                path,
                direct,
                qcow2,
                engine,
            } => {
                let mut drive = json!({
                    "drive_id": "bench", "path_on_host": utf8(path)?, "is_root_device": false,
                    "is_read_only": false,
                });
                // Firecracker's way past the page cache there is not. Its default offers no flush.
                if kind == Kind::Alveole {
                    drive["cache_type"] = if *direct { "Direct" } else { "Writeback" }.into();
                    drive["format"] = if *qcow2 { "qcow2" } else { "raw" }.into();
                }
                if let Some(engine) = engine {
                    drive["io_engine"] = (*engine).into();
                }
                json!({ "drives": [drive] })
            }
            Self::Tap {
                name,
                mac,
                vhost,
                vsock,
            } => {
                let mut interface =
                    json!({ "iface_id": "bench", "host_dev_name": name, "guest_mac": mac });
                if *vhost {
                    interface["vhost"] = true.into();
                }
                json!({
                    "drives": [],
                    "network-interfaces": [interface],
                    "vsock": { "guest_cid": 3, "uds_path": utf8(vsock)? },
                })
            }
        })
    }

    fn of_cloud_hypervisor(&self) -> anyhow::Result<String> {
        Ok(match self {
            Self::Disk { path, direct, .. } => format!(
                "--disk\npath={},image_type=raw,direct={}",
                utf8(path)?,
                if *direct { "on" } else { "off" }
            ),
            Self::Tap {
                name, mac, vsock, ..
            } => format!(
                "--net\ntap={name},mac={mac}\n--vsock\ncid=3,socket={}",
                utf8(vsock)?
            ),
        })
    }

    fn of_qemu(&self, pci: bool) -> anyhow::Result<String> {
        let bus = if pci {
            "pci,disable-legacy=on"
        } else {
            "device"
        };
        Ok(match self {
            Self::Disk { path, direct, .. } => format!(
                "-object\niothread,id=io\n\
                 -drive\nif=none,id=disk,file={},format=raw,cache={},aio=io_uring\n\
                 -device\nvirtio-blk-{bus},drive=disk,iothread=io",
                utf8(path)?,
                if *direct { "none" } else { "writeback" }
            ),
            Self::Tap {
                name, mac, vhost, ..
            } => format!(
                "-netdev\ntap,id=net,ifname={name},script=no,downscript=no,vhost={}\n\
                 -device\nvirtio-net-{bus},netdev=net,mac={mac}",
                if *vhost { "on" } else { "off" }
            ),
        })
    }
}

impl Machine {
    /// The words with which `vmm` runs it, its console on stdout. Writes the files that it reads to `dir`.
    ///
    /// # Errors
    /// A file cannot be written, a path fits no command line.
    pub(crate) fn arguments(&self, vmm: &Vmm, dir: &Path) -> anyhow::Result<Vec<OsString>> {
        let (kernel, initrd, line) = (utf8(&self.kernel)?, utf8(&self.initrd)?, &self.line);
        let (cpus, memory) = (self.cpus, self.memory_mib);
        let pci = vmm.name.ends_with("-pci");
        let text = match vmm.kind {
            Kind::Alveole | Kind::Firecracker => {
                let mut config = self.device.sections(vmm.kind)?;
                config["boot-source"] = json!({
                    "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": line,
                });
                config["machine-config"] = json!({ "vcpu_count": cpus, "mem_size_mib": memory });
                let file = dir.join("machine.json");
                fs::write(&file, config.to_string())
                    .with_context(|| format!("cannot write {}", file.display()))?;
                let file = utf8(&file)?;
                if vmm.kind == Kind::Alveole {
                    format!("--no-api\n--console\nstdio\n--config-file\n{file}")
                } else {
                    let pci = if pci { "\n--enable-pci" } else { "" };
                    format!("--no-api\n--level\nError\n--config-file\n{file}{pci}")
                }
            }
            Kind::CloudHypervisor => format!(
                "--kernel\n{kernel}\n--initramfs\n{initrd}\n--cmdline\n{line}\n--cpus\nboot={cpus}\n\
                 --memory\nsize={memory}M\n--serial\ntty\n--console\noff\n{}",
                self.device.of_cloud_hypervisor()?
            ),
            Kind::Qemu => {
                let cpu = if vmm.without_arch_capabilities {
                    "host,-arch-capabilities"
                } else {
                    "host"
                };
                let pcie = if pci { ",pcie=on" } else { "" };
                format!(
                    "-no-user-config\n-nodefaults\n-display\nnone\n-no-reboot\n-nic\nnone\n\
                     -M\nmicrovm,pit=on,pic=on,rtc=on,isa-serial=on{pcie}\n-accel\nkvm\n-cpu\n{cpu}\n\
                     -smp\n{cpus}\n-m\n{memory}\n-kernel\n{kernel}\n-initrd\n{initrd}\n-append\n{line}\n\
                     -global\nvirtio-mmio.force-legacy=false\n{}\n-serial\nstdio",
                    self.device.of_qemu(pci)?
                )
            }
        };
        Ok(text.split('\n').map(OsString::from).collect())
    }
}
