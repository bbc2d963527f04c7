//! `alveole run`: describes a machine and becomes the VMM that runs it.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

use alveole_host::{doctor, in_lab, programs};
use alveole_vm_config::{BootSource, CpuConfigSource, Entropy, MachineConfig, VmConfig};
use anyhow::{Context, bail};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::FdFlags;

use crate::console::Console;
use crate::disk::{self, Disk};
use crate::guests::ImageArgs;
use crate::interfaces::{self, NetworkArgs, Plugged};
use crate::lab;
use crate::size::MemorySize;

/// A reset ends the machine at once instead of after trying the ways of other machines; a panic resets
/// without waiting. Nothing is hushed: whoever wants that appends `quiet`.
const CMDLINE: &str = "reboot=k panic=-1";
/// Put before it if there is a console.
const CMDLINE_CONSOLE: &str = "console=ttyS0";

#[derive(clap::Args)]
#[command(after_help = "\
The kernel is a vmlinux (ELF) or a bzImage, such as a distribution's /boot/vmlinuz. On a terminal, \
Ctrl-A x ends the guest and Ctrl-A c shows help.

Exit status: that of alveole-vmm (0: the guest powered off; see alveole-vmm --help), 2 for a wrong \
command line, 1 if the VMM could not be started.")]
pub(crate) struct RunArgs {
    /// Kernel image to boot; with an image, the name of a kernel of `alveole kernel ls` [the default one]
    #[arg(long, value_name = "FILE", required_unless_present = "image")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,

    /// Kernel command line [default: console=ttyS0 reboot=k panic=-1, without console= if there is none]
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,

    /// Add to the kernel command line; repeatable
    #[arg(long, value_name = "TEXT", visible_alias = "cmdline-append")]
    pub(crate) append: Vec<String>,

    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) cpus: u8,

    /// Guest memory: 512M, 2G, or a plain number of MiB
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub(crate) memory: MemorySize,

    // Not as a comment: rustdoc would take the brackets for links.
    #[arg(
        long,
        value_name = "PATH[,OPTION]...",
        help = "Disk: an image or a block device, and what is special about it: PATH[,ro][,data]\
                [,cache=writeback|direct|unsafe][,engine=io_uring|sync][,format=raw|qcow2][,backing=beside|anywhere][,queues=N][,serial=TEXT][,id=NAME]. \
                The first is the root device unless it is marked `data`; repeatable"
    )]
    pub(crate) disk: Vec<Disk>,

    /// Sockets between host and guest: CID is the guest's address (3 or more), PATH the unix socket where
    /// programs connect and write `CONNECT <port>`; the guest's connections go to `PATH_<port>`
    #[arg(long, value_name = "CID:PATH")]
    pub(crate) vsock: Option<Vsock>,

    #[command(flatten)]
    pub(crate) network: NetworkArgs,

    /// What the processors are to say of themselves, other than this host's: a file as of `PUT /cpu-config` of the API. With it a
    /// snapshot can be loaded on hosts with fewer features
    #[arg(long, value_name = "FILE")]
    pub(crate) cpu_config: Option<PathBuf>,

    /// Serial console: stdio, file:PATH, unix:PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub(crate) console: Console,

    /// Say how long it took to the first guest instruction and to the guest's init
    #[arg(long)]
    pub(crate) boot_timer: bool,

    /// Run in the lab: a host in software, for machines whose KVM cannot run guests. Standard input
    /// that is a pipe or a file is read to its end first
    #[arg(long)]
    pub(crate) lab: bool,

    /// Do not ask first whether this machine's KVM can run an unmodified kernel
    #[arg(long)]
    pub(crate) no_probe: bool,

    #[command(flatten)]
    pub(crate) for_image: ImageArgs,

    /// The image to run, as a container's; without one, --kernel is booted
    pub(crate) image: Option<String>,

    /// The program and its arguments, instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// A socket device in one word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vsock(alveole_vm_config::Vsock);

impl FromStr for Vsock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "give CID:PATH, for instance 3:/run/user/1000/guest.sock";
        let Some((cid, path)) = text.split_once(':').filter(|(_, path)| !path.is_empty()) else {
            return Err(EXPECTED.into());
        };
        let guest_cid = cid
            .parse()
            .map_err(|_| format!("{cid:?} is no number; {EXPECTED}"))?;
        Ok(Self(alveole_vm_config::Vsock {
            guest_cid,
            uds_path: path.into(),
            vsock_id: None,
        }))
    }
}

impl RunArgs {
    /// That nothing is asked for which only a machine without an image has.
    pub(crate) fn refuse_bare_options(&self) -> anyhow::Result<()> {
        let given = [
            ("--initrd", self.initrd.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--append", !self.append.is_empty()),
            ("--vsock", self.vsock.is_some()),
            ("--console", self.console != Console::Stdio),
            ("--boot-timer", self.boot_timer),
        ];
        if let Some((word, _)) = given.iter().find(|(_, given)| *given) {
            bail!("{word} is for guests without an image: leave it out, or the image");
        }
        Ok(())
    }
}

/// Becomes the VMM, or the lab with the VMM in it. Comes back only with an error.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<Infallible> {
    if !args.for_image.limits.is_empty() {
        bail!(
            "--disk-bandwidth, --disk-iops and --net-bandwidth are for guests of images: leave them out, or name an image"
        );
    }
    let vmm = programs::vmm()?;
    if args.lab && !in_lab() {
        return lab::enter(args);
    }
    // The lab leads nowhere.
    let network = args.network.begin(!in_lab())?;
    if !args.no_probe {
        let probed = doctor::probe_kvm();
        if !probed.capable {
            bail!("{}", refusal(&probed.text, in_lab()));
        }
    }
    let plugged = network.finish()?;
    let description = hand_over(&describe(args, &plugged))?;
    let mut command = Command::new(&vmm);
    command
        .arg("--config-file")
        .arg(path_of(&description))
        .arg("--no-api")
        // Half the latency of virtio-mmio, whose interrupts cost two exits each.
        .arg("--enable-pci")
        // People expect of a machine that they end from outside that it shuts down.
        .args(["--on-sigterm", "power-button"])
        .arg("--console")
        .arg(args.console.to_string());
    if args.boot_timer {
        command.arg("--boot-timer");
    }
    interfaces::keep_over_exec(&plugged.descriptors)?;
    Err(command.exec()).with_context(|| format!("cannot start {}", vmm.display()))
}

/// What a process that inherits the file finds it by.
pub(crate) fn path_of(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn refusal(why: &str, in_lab: bool) -> String {
    let cure = if in_lab {
        "`alveole doctor` says more (this is the lab already)"
    } else {
        "--lab runs it in the lab (a host in software)"
    };
    format!("cannot run a guest here: {why}; {cure}, --no-probe tries anyway")
}

fn describe(args: &RunArgs, plugged: &Plugged) -> VmConfig {
    VmConfig {
        boot_source: BootSource {
            kernel_image_path: args.kernel.clone().unwrap_or_default(),
            initrd_path: args.initrd.clone(),
            boot_args: Some(cmdline(args, &plugged.words)),
        },
        machine_config: MachineConfig {
            vcpu_count: args.cpus,
            mem_size_mib: args.memory.mib(),
            ..MachineConfig::default()
        },
        drives: disk::drives(&args.disk),
        network_interfaces: plugged.interfaces.clone(),
        vsock: args.vsock.as_ref().map(|vsock| vsock.0.clone()),
        entropy: Some(Entropy::default()),
        cpu_config: args.cpu_config.clone().map(CpuConfigSource::File),
        ..VmConfig::default()
    }
}

/// `told`: what the guest is to set up, which follows whatever else is said.
fn cmdline(args: &RunArgs, told: &str) -> String {
    let mut parts = match &args.cmdline {
        Some(text) => vec![text.as_str()],
        None if args.console == Console::None => vec![CMDLINE],
        None => vec![CMDLINE_CONSOLE, CMDLINE],
    };
    parts.extend(args.append.iter().map(String::as_str));
    parts.push(told);
    parts.retain(|part| !part.is_empty());
    parts.join(" ")
}

/// Puts the description into a file that lives as long as its descriptor, which the VMM inherits, and
/// that nobody can change any more.
pub(crate) fn hand_over(config: &impl serde::Serialize) -> anyhow::Result<File> {
    const ACT: &str = "cannot hand the machine description to the VMM";
    let json =
        serde_json::to_vec(config).context("cannot write the machine description as JSON")?;
    let mut file = memory_file().context(ACT)?;
    file.write_all(&json).context(ACT)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).context(ACT)?;
    rustix::io::fcntl_setfd(&file, FdFlags::empty()).context(ACT)?;
    Ok(file)
}

fn memory_file() -> io::Result<File> {
    let make = |more| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | more;
        rustix::fs::memfd_create("alveole-machine", flags)
    };
    // Hosts may demand the flag (sysctl vm.memfd_noexec); Linux before 6.3 does not know it.
    let file = make(MemfdFlags::NOEXEC_SEAL).or_else(|e| match e {
        rustix::io::Errno::INVAL => make(MemfdFlags::empty()),
        other => Err(other),
    })?;
    Ok(File::from(file))
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: RunArgs,
    }

    pub(crate) fn parse(words: &[&str]) -> RunArgs {
        let line = ["run", "--kernel", "k"].iter().chain(words);
        Line::try_parse_from(line).unwrap().args
    }

    #[test]
    fn the_default_command_line_shows_the_boot() {
        assert_eq!(cmdline(&parse(&[]), ""), "console=ttyS0 reboot=k panic=-1");
        assert_eq!(
            cmdline(&parse(&["--console", "file:x"]), ""),
            "console=ttyS0 reboot=k panic=-1"
        );
        assert_eq!(
            cmdline(&parse(&["--console", "none"]), ""),
            "reboot=k panic=-1"
        );
    }

    #[test]
    fn cmdline_replaces_and_append_adds() {
        assert_eq!(cmdline(&parse(&["--cmdline", "a"]), ""), "a");
        assert_eq!(cmdline(&parse(&["--cmdline", ""]), ""), "");
        assert_eq!(
            cmdline(&parse(&["--cmdline", "", "--append", "b"]), ""),
            "b"
        );
        assert_eq!(
            cmdline(
                &parse(&["--append", "quiet", "--cmdline-append", "rdinit=/bin/sh"]),
                ""
            ),
            "console=ttyS0 reboot=k panic=-1 quiet rdinit=/bin/sh"
        );
    }

    #[test]
    fn the_refusal_names_why_and_both_ways_out() {
        let text = refusal("popcnt is unknown", false);
        assert!(text.contains("popcnt is unknown"));
        assert!(text.contains("--lab") && text.contains("--no-probe"));
        assert!(!refusal("x", true).contains("--lab"));
    }

    #[test]
    fn the_description_cannot_be_changed_and_can_be_opened_again() {
        let config = describe(
            &parse(&["--cpus", "2", "--memory", "1G"]),
            &Plugged::default(),
        );
        let mut file = hand_over(&config).unwrap();
        assert!(file.write_all(b"x").is_err());
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let json = std::fs::read_to_string(path).unwrap();
        assert_eq!(VmConfig::from_json(&json, "x").unwrap(), config);
        assert_eq!(config.machine_config.vcpu_count, 2);
        assert_eq!(config.machine_config.mem_size_mib, 1024);
    }
}
