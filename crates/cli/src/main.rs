//! The admin wrapper people type.
//!
//! Turns a command line into a machine description and becomes the VMM, makes and mends the images that are
//! guests' disks, gets and keeps container images, or shows what the host can do.
//! Deliberately does not know: how a guest is built or run (`alveole-vmm` does), how blocks lie in an image
//! (`alveole-block-store` does), how the host is examined (`alveole-host` does).

mod build;
mod commit;
mod console;
mod disk;
mod doctor;
mod generate;
mod guests;
mod image;
mod images;
mod interfaces;
mod kernel;
mod lab;
mod login;
mod memory;
mod net;
mod packing;
mod places;
mod pool;
mod run;
mod size;
mod snapshot;
mod system;
mod volume;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

const START: &str = "\
alveole runs microVMs: small Linux guests, each in a process of its own.

To start with:
  alveole doctor                     what this machine can do, and what to mend
  alveole kernel add PACKAGE.deb     a kernel for guests of images
  alveole run -it --rm debian        run a container image as a microVM

alveole --help shows everything.
";

/// Runs microVMs: small Linux guests, each in a process of its own.
#[derive(Parser)]
#[command(name = "alveole", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a guest; this process becomes the VMM
    Run(Box<run::RunArgs>),
    /// Show what this machine can do, and what to do about what it cannot
    Doctor(doctor::DoctorArgs),
    /// Make, show, resize and mend the images that are guests' disks
    Disk(images::DiskArgs),
    /// Get, show and remove container images, from registries and files
    Image(image::ImageArgs),
    /// Make, show and remove networks of guests on this host
    Net(net::NetArgs),
    /// Kernels that guests of images boot
    Kernel(kernel::KernelArgs),
    /// Make an image of what was changed in a VM
    Commit(commit::CommitArgs),
    /// Disks with a name, which outlive the VMs that use them
    Volume(volume::VolumeArgs),
    /// Keep moments of running VMs, to go on from
    Snapshot(snapshot::SnapshotArgs),
    /// Pack, unpack and serve memory files of snapshots that were taken by a monitor's API
    Memory(memory::MemoryArgs),
    /// Make VMs that go on from a snapshot, each one of its own
    Restore(snapshot::RestoreArgs),
    /// Make copies of a running VM, or of a snapshot, that go on from there, each a VM of its own
    Fork(snapshot::ForkArgs),
    /// Keep copies of a snapshot ready, to be taken at once
    Pool(pool::PoolArgs),
    #[command(flatten)]
    Guest(guests::GuestCommand),
    /// Show what all of it takes on this host's disk, and remove what nobody needs
    System(system::SystemArgs),
    /// Make completions for shells, and man pages
    Generate(generate::GenerateArgs),
    #[command(hide = true)]
    Keep(guests::KeepArgs),
}

/// Shows what the parts below warn about.
struct Warnings;

impl log::Log for Warnings {
    fn enabled(&self, about: &log::Metadata<'_>) -> bool {
        about.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            hint(&format!("warning: {}", record.args()));
        }
    }

    fn flush(&self) {}
}

fn main() -> ExitCode {
    // It is the first and only one.
    if log::set_logger(&Warnings).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let done = match cli.command {
        None => print(START).map(|()| ExitCode::SUCCESS),
        Some(Command::Run(args)) => match &args.image {
            Some(image) => {
                let words = matches
                    .subcommand_matches("run")
                    .map(interfaces::NetworkArgs::words);
                guests::run_image(&args, image, words.unwrap_or_default())
            }
            None => run::run(&args).map(|never| match never {}),
        },
        Some(Command::Doctor(args)) => doctor::doctor(&args),
        Some(Command::Disk(args)) => images::disk(&args),
        Some(Command::Image(args)) => image::image(&args),
        Some(Command::Net(args)) => net::net(&args),
        Some(Command::Kernel(args)) => kernel::kernel(&args),
        Some(Command::Commit(args)) => commit::commit(&args),
        Some(Command::Volume(args)) => volume::volume(&args),
        Some(Command::Snapshot(args)) => snapshot::snapshot(&args),
        Some(Command::Memory(args)) => memory::memory(&args),
        Some(Command::Restore(args)) => snapshot::restore(&args),
        Some(Command::Fork(args)) => snapshot::fork(&args),
        Some(Command::Pool(args)) => pool::pool(&args),
        Some(Command::Guest(command)) => guests::guest(&command),
        Some(Command::System(args)) => system::system(&args),
        Some(Command::Generate(args)) => generate::generate(&args, Cli::command()),
        Some(Command::Keep(args)) => guests::keep_vm(&args),
    };
    done.unwrap_or_else(|e| {
        hint(&format!("{e:#}"));
        ExitCode::FAILURE
    })
}

/// Says something beside the result. A standard error that is gone is no reason to fail.
fn hint(text: &str) {
    let _ = writeln!(io::stderr(), "alveole: {text}");
}

/// For each of these names; what fails is told, and the others go on.
fn each_name(
    names: &[String],
    how: impl Fn(&str) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let mut result = ExitCode::SUCCESS;
    for name in names {
        if let Err(e) = how(name) {
            hint(&format!("{e:#}"));
            result = ExitCode::FAILURE;
        }
    }
    Ok(result)
}

/// Prints to standard output. A reader that has seen enough (`alveole doctor | head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(e).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}
