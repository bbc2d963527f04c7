//! `alveole kernel`: the kernels that guests of images boot.

use std::path::PathBuf;
use std::process::ExitCode;

use alveole_guest_kernel::Source;
use anyhow::Context;
use clap::Subcommand;

use crate::places::Places;
use crate::print;
use crate::size::human;

#[derive(clap::Args)]
pub(crate) struct KernelArgs {
    #[command(subcommand)]
    command: KernelCommand,
}

#[derive(Subcommand)]
enum KernelCommand {
    /// Take a kernel: a distribution's package (.deb), a file of a kernel, or this host's own
    #[command(after_help = "\
Debian: apt-get download linux-image-cloud-amd64's own package (linux-image-VERSION-cloud-amd64), then\n  \
alveole kernel add linux-image-*.deb")]
    Add {
        /// A package (.deb), or a kernel: a vmlinuz or vmlinux
        #[arg(value_name = "FILE", required_unless_present = "host")]
        file: Option<PathBuf>,
        /// The kernel's modules: a folder lib/modules/RELEASE
        #[arg(long, value_name = "FOLDER", conflicts_with = "host")]
        modules: Option<PathBuf>,
        /// The kernel that this host runs, from /boot and /lib/modules
        #[arg(long, conflicts_with = "file")]
        host: bool,
        /// What to call it [its release]
        #[arg(long)]
        name: Option<String>,
    },
    /// Show the kernels
    Ls {
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: crate::guests::Format,
    },
    /// Show which kernel is taken if none is named, or have another one
    Default {
        /// A kernel's name
        name: Option<String>,
    },
    /// Remove a kernel
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

pub(crate) fn kernel(args: &KernelArgs) -> anyhow::Result<ExitCode> {
    let store = Places::usual().kernels();
    match &args.command {
        KernelCommand::Add {
            file,
            modules,
            host,
            name,
        } => {
            let source = match file {
                _ if *host => Source::Host,
                Some(file) if file.extension().is_some_and(|e| e == "deb") => {
                    Source::Package(file.clone())
                }
                Some(file) => Source::Files {
                    kernel: file.clone(),
                    modules: modules.clone(),
                },
                None => Source::Host,
            };
            let kernel = store.add(&source, name.as_deref())?;
            print(&format!("{}\n", kernel.name))?;
        }
        KernelCommand::Ls { format } => {
            let all = store.list()?;
            if *format == crate::guests::Format::Json {
                let json = serde_json::to_string_pretty(&all).context("cannot write JSON")?;
                print(&format!("{json}\n"))?;
            } else {
                let rows = all.iter().map(|kernel| {
                    let mark = if kernel.default { "*" } else { "" };
                    vec![
                        format!("{}{mark}", kernel.name),
                        kernel.release.clone(),
                        human(kernel.size_bytes),
                        kernel.from.clone(),
                    ]
                });
                print(&crate::guests::table(
                    &["NAME", "RELEASE", "SIZE", "FROM"],
                    rows.collect(),
                ))?;
            }
        }
        KernelCommand::Default { name: None } => {
            print(&format!("{}\n", store.get(None)?.name))?;
        }
        KernelCommand::Default { name: Some(name) } => store.set_default(name)?,
        KernelCommand::Rm { names } => {
            for name in names {
                store.remove(name)?;
                print(&format!("{name}\n"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
