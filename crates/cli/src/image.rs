//! `alveole image`: container images on this host.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;

use alveole_image::{
    Format, Image, ImageError, Import, Limits, Platform, Progress, Quiet, Reference, Store,
};
use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::places::Places;
use crate::size::{DiskSize, human};

/// Digits of an id that are shown to people.
const SHORT_ID: usize = 12;

#[derive(Args)]
#[command(after_help = "\
An image is named as docker names it: [REGISTRY/]NAME[:TAG][@DIGEST]; the registry is docker.io if none is said. Credentials are those \
that `login`, here or of docker, podman or skopeo, keeps, with credential helpers. A registry on this host may do without TLS.

Each image becomes one root disk (EROFS) that is only read; all images with the same layers share it. No rights are needed, and no daemon.

Exit status: 0 if it was done, 1 if not, 2 for a wrong command line.")]
pub(crate) struct ImageArgs {
    /// Where images are kept [/var/lib/alveole/images; for others than root $XDG_DATA_HOME/alveole/images]
    #[arg(long, global = true, value_name = "FOLDER")]
    store: Option<PathBuf>,

    #[command(subcommand)]
    act: Act,
}

#[derive(Subcommand)]
enum Act {
    /// Get an image from its registry
    Pull(Pull),
    /// Take an image from a file, a folder or the standard input
    Import(ImportArgs),
    /// Make an image from a recipe, a part of the Dockerfile's language
    Build(Box<crate::build::BuildArgs>),
    /// Show all images
    Ls {
        /// For people or for programs
        #[arg(long, value_enum, default_value_t = Output::Text)]
        format: Output,
        /// Only show ids
        #[arg(long, short)]
        quiet: bool,
    },
    /// Show what an image is: how it is run, its layers, its root disk
    Inspect {
        /// Names, or beginnings of ids
        #[arg(required = true)]
        images: Vec<String>,
        /// For people or for programs
        #[arg(long, value_enum, default_value_t = Output::Json)]
        format: Output,
    },
    /// Check a name and a password with a registry, and keep them for it
    Login(crate::login::LoginArgs),
    /// Forget the name and the password for a registry
    Logout {
        /// The registry [docker.io]
        registry: Option<String>,
    },
    /// Remove names, and what no image needs any more
    Rm {
        /// Names, or beginnings of ids
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove what no image needs: content, root disks, unfinished downloads
    Prune {
        /// All images as well
        #[arg(long)]
        all: bool,
    },
    /// Write an image as a tar stream
    Export(Export),
}

#[derive(Args)]
#[command(
    after_help = "What is here already is not asked for again. A pull that was broken off goes on where it ended; `alveole image prune` removes \
what it has left."
)]
struct Pull {
    /// The image
    image: Reference,

    #[command(flatten)]
    how: How,
}

#[derive(Args)]
#[command(after_help = "\
Taken are OCI layouts and docker archives (`docker save`, `podman save`, `skopeo copy`), as tar or folder, and root file systems, as tar or \
folder. Tar may be plain or packed by gzip or zstd. In a folder that somebody else than root imports, that user's files become root's.")]
struct ImportArgs {
    /// File or folder; - is the standard input
    from: PathBuf,

    /// Name for the image [default: what the archive says]
    name: Option<Reference>,

    #[command(flatten)]
    how: How,
}

#[derive(Args)]
pub(crate) struct How {
    /// For which machine, where there are several: OS/ARCHITECTURE[/VARIANT] [default: this one]
    #[arg(long)]
    platform: Option<Platform>,

    /// Show no progress
    #[arg(long, short)]
    quiet: bool,

    /// Most files, directories and whiteouts in all layers
    #[arg(long, value_name = "N", default_value_t = Limits::default().entries)]
    max_entries: u64,

    /// Largest root disk; 256G if it is not said
    #[arg(long, value_name = "SIZE")]
    max_size: Option<DiskSize>,

    /// Most bytes that come out of one byte of a packed layer
    #[arg(long, value_name = "N", default_value_t = Limits::default().ratio)]
    max_ratio: u64,

    /// Most device nodes
    #[arg(long, value_name = "N", default_value_t = Limits::default().devices)]
    max_devices: u64,
}

#[derive(Args)]
struct Export {
    /// Name, or beginning of an id
    image: String,

    /// File to write [default: the standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// What to write
    #[arg(long = "as", value_enum, default_value_t = ExportFormat::Oci)]
    format: ExportFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExportFormat {
    /// An OCI layout
    Oci,
    /// What `docker load` takes
    Docker,
    /// The files of its root
    Rootfs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl How {
    pub(crate) fn limits(&self) -> Limits {
        self.import(None).limits
    }

    fn import(&self, name: Option<Reference>) -> Import {
        let limits = Limits::default();
        Import {
            name,
            platform: self.platform.clone().unwrap_or_else(Platform::host),
            limits: Limits {
                entries: self.max_entries,
                disk_bytes: self.max_size.map_or(limits.disk_bytes, DiskSize::bytes),
                ratio: self.max_ratio,
                devices: self.max_devices,
            },
        }
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Bars for people who watch, else nothing.
    pub(crate) fn progress(&self) -> Box<dyn Progress> {
        if self.quiet || !io::stderr().is_terminal() {
            return Box::new(Quiet);
        }
        Box::new(Bars::default())
    }
}

/// Root disks of VMs and snapshots, which stay as long as these are there.
pub(crate) fn in_use() -> anyhow::Result<Vec<PathBuf>> {
    let places = Places::usual();
    let of_vms = places.vms().list()?.into_iter().map(|vm| vm.record);
    let snapshots = places.snapshots().list()?;
    let of_snapshots = snapshots.into_iter().map(|s| s.record.record);
    Ok(of_vms.chain(of_snapshots).map(|r| r.root_disk).collect())
}

/// The image of this name, from its registry if it is not here.
pub(crate) fn here_or_pulled(name: &str) -> anyhow::Result<Image> {
    here_or_pulled_into(&Places::usual().images()?, name)
}

/// The image of this name in a store, from its registry if it is not there.
pub(crate) fn here_or_pulled_into(store: &Store, name: &str) -> anyhow::Result<Image> {
    match store.resolve(name) {
        Err(ImageError::NotFound(_)) => {}
        found => return found.map_err(|e| anyhow!("{e}")),
    }
    let Ok(reference) = name.parse::<Reference>() else {
        return store.resolve(name).map_err(|e| anyhow!("{e}"));
    };
    crate::hint(&format!("the image {reference} is not here; it is pulled"));
    let progress: Box<dyn Progress> = match io::stderr().is_terminal() {
        true => Box::new(Bars::default()),
        false => Box::new(Quiet),
    };
    let how = Import {
        name: None,
        platform: Platform::host(),
        limits: Limits::default(),
    };
    store
        .pull(&reference, &how, &*progress)
        .map_err(|e| anyhow!("{e}; `alveole image import` takes images from files"))
}

pub(crate) fn image(args: &ImageArgs) -> anyhow::Result<ExitCode> {
    act(args).map_err(|error| match error.downcast_ref::<ImageError>() {
        // Its text has its causes in it.
        Some(error) => anyhow!("{error}"),
        None => error,
    })
}

fn act(args: &ImageArgs) -> anyhow::Result<ExitCode> {
    let store = match &args.store {
        Some(path) => Store::open(path)?,
        None => Places::usual().images()?,
    };
    match &args.act {
        Act::Pull(args) => {
            let progress = args.how.progress();
            let image = store.pull(&args.image, &args.how.import(None), &*progress)?;
            drop(progress);
            crate::print(&got(&image, &args.image.to_string()))?;
        }
        Act::Import(args) => import(&store, args)?,
        Act::Build(args) => crate::build::build(&store, args)?,
        Act::Ls { format, quiet } => crate::print(&list(&store, *format, *quiet)?)?,
        Act::Inspect { images, format } => {
            let found: Result<Vec<Image>, _> =
                images.iter().map(|name| store.resolve(name)).collect();
            let found = found?;
            crate::print(&match format {
                Output::Json => json(&found)?,
                Output::Text => found.iter().map(text).collect::<Vec<_>>().join("\n"),
            })?;
        }
        Act::Login(args) => crate::login::log_in(args)?,
        Act::Logout { registry } => crate::login::log_out(registry.as_deref())?,
        Act::Rm { images } => {
            for image in images {
                for name in store.remove(image, &in_use()?)? {
                    crate::print(&format!("removed {name}\n"))?;
                }
            }
        }
        Act::Prune { all } => {
            let (names, freed_bytes) = store.prune(&in_use()?, *all)?;
            for name in names {
                crate::print(&format!("removed {name}\n"))?;
            }
            crate::print(&format!("freed {}\n", human(freed_bytes)))?;
        }
        Act::Export(args) => export(&store, args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn import(store: &Store, args: &ImportArgs) -> anyhow::Result<()> {
    let progress = args.how.progress();
    let how = args.how.import(args.name.clone());
    let images = if args.from.as_os_str() == "-" {
        if io::stdin().is_terminal() {
            bail!(
                "the standard input is a terminal: lead an archive into it, `... | alveole image import - NAME`"
            );
        }
        store.import_stream(io::stdin().lock(), &how, &*progress)?
    } else {
        store.import(&args.from, &how, &*progress)?
    };
    drop(progress);
    for image in &images {
        let newest = args.name.as_ref().map(ToString::to_string);
        let name = newest
            .or_else(|| image.names.last().cloned())
            .unwrap_or_default();
        crate::print(&got(image, &name))?;
    }
    Ok(())
}

pub(crate) fn got(image: &Image, name: &str) -> String {
    format!(
        "{}: {}, {} layers of {}, root disk of {}\n",
        familiar(name),
        short(image),
        image.layers.len(),
        human(image.layers_bytes),
        human(image.root_disk_bytes)
    )
}

fn export(store: &Store, args: &Export) -> anyhow::Result<()> {
    let format = match args.format {
        ExportFormat::Oci => Format::Oci,
        ExportFormat::Docker => Format::Docker,
        ExportFormat::Rootfs => Format::RootFs,
    };
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            bail!("the standard output is a terminal: say --output FILE, or lead it elsewhere");
        }
        let mut out = BufWriter::with_capacity(1 << 20, io::stdout().lock());
        return Ok(store.export(&args.image, format, &mut out)?);
    };
    // Nothing is overwritten, and nothing half-written stays.
    let file = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let done = store.export(&args.image, format, &mut out);
    if done.is_err() {
        let _ = std::fs::remove_file(path);
    }
    Ok(done?)
}

// Showing ----------------------------------------------------------------------------------------

fn short(image: &Image) -> &str {
    image.id.hex().get(..SHORT_ID).unwrap_or_default()
}

fn familiar(name: &str) -> String {
    name.parse::<Reference>()
        .map_or_else(|_| name.to_owned(), |name| name.familiar())
}

fn json(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value).context("cannot write what was found as JSON")? + "\n")
}

fn list(store: &Store, format: Output, quiet: bool) -> anyhow::Result<String> {
    let images = store.images()?;
    if quiet {
        return Ok(images
            .iter()
            .map(|image| format!("{}\n", short(image)))
            .collect());
    }
    if format == Output::Json {
        return json(&images);
    }
    let mut rows = vec![["NAME", "ID", "PLATFORM", "LAYERS", "ROOT DISK"].map(str::to_owned)];
    for image in &images {
        for name in &image.names {
            rows.push([
                familiar(name),
                short(image).to_owned(),
                image.platform.to_string(),
                human(image.layers_bytes),
                human(image.root_disk_bytes),
            ]);
        }
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    Ok(text)
}

fn text(image: &Image) -> String {
    let config = &image.config;
    let names: Vec<String> = image.names.iter().map(|name| familiar(name)).collect();
    let labels: Vec<String> = config
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let mut text = String::new();
    for (what, value) in [
        ("names", names.join(", ")),
        ("id", image.id.to_string()),
        ("manifest", image.manifest.to_string()),
        ("platform", image.platform.to_string()),
        ("created", image.created.clone().unwrap_or_default()),
        ("entrypoint", config.entrypoint.join(" ")),
        ("command", config.cmd.join(" ")),
        ("user", config.user.clone()),
        ("folder", config.working_dir.clone()),
        ("variables", config.env.join(" ")),
        ("volumes", config.volumes.join(", ")),
        ("ports", config.exposed_ports.join(", ")),
        ("stop signal", config.stop_signal.clone()),
        ("labels", labels.join(", ")),
        (
            "layers",
            format!("{}, {}", image.layers.len(), human(image.layers_bytes)),
        ),
        (
            "root disk",
            format!(
                "{}, {}",
                image.root_disk.display(),
                human(image.root_disk_bytes)
            ),
        ),
    ] {
        if !value.is_empty() {
            // What an image says of itself must not move the terminal's cursor.
            let value: String = value
                .chars()
                .map(|c| if c.is_control() { '\u{fffd}' } else { c })
                .collect();
            // Writing to a string does not fail.
            let _ = writeln!(text, "{what:11}  {value}");
        }
    }
    text
}

/// A bar for each thing that goes on.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    bars: Mutex<Vec<ProgressBar>>,
}

impl Bars {
    fn with(&self, number: usize, act: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = self
            .bars
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(number)
        {
            act(bar);
        }
    }
}

impl Progress for Bars {
    fn start(&self, what: &str, total_bytes: Option<u64>) -> usize {
        let bar = match total_bytes {
            Some(total) => ProgressBar::new(total).with_style(style(
                "{msg:34!} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}",
            )),
            None => ProgressBar::no_length()
                .with_style(style("{msg:34!} {bytes} {binary_bytes_per_sec}")),
        };
        let bar = self.all.add(bar);
        bar.set_message(what.replace("sha256:", ""));
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        bars.push(bar);
        bars.len() - 1
    }

    fn advance(&self, number: usize, bytes: u64) {
        self.with(number, |bar| bar.inc(bytes));
    }

    fn done(&self, number: usize) {
        self.with(number, ProgressBar::finish_and_clear);
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are ours.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Drop for Bars {
    fn drop(&mut self) {
        // What is left of bars would stand above the next line. A terminal that is gone is no reason to fail.
        let _ = self.all.clear();
        let _ = io::stderr().flush();
    }
}
