//! `alveole disk`: makes, shows, resizes and mends images.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use alveole_block_store::tools::{self, ImageInfo, Repair, Report, ToolError};
use alveole_block_store::{Backing, Format, OpenError};
use anyhow::{Context, anyhow, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use crate::size::{DiskSize, NewSize, human};

/// 64 KiB, as everybody has it.
const CLUSTER_BITS: u32 = 16;
/// `check`: room is lost, data are not.
const LEAKS: u8 = 3;
/// `check`: data may be lost.
const DAMAGED: u8 = 4;

#[derive(Args)]
#[command(after_help = "\
SIZE is 512M, 2G, or a plain number of MiB. The format of an image is what --format says, else qcow2 if its \
name ends in .qcow2, else raw; it is never guessed from the content, which a guest could have written.

Exit status: 0 if it was done, 1 if not, 2 for a wrong command line; of `check`, see there. What exists already \
is never overwritten; an image that a guest uses is only looked at.")]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    act: Act,
}

#[derive(Subcommand)]
enum Act {
    /// Make an empty disk, which takes room when it is written
    Create(Create),
    /// Make a disk over a shared base, which is only read from then on (copy-on-write)
    Overlay(Overlay),
    /// Show what an image is
    Info(Info),
    /// Write what an overlay holds into its base
    Commit(Commit),
    /// Give a disk another size
    Resize(Resize),
    /// Compare the tables of a qcow2 image with one another
    Check(Check),
    /// Copy a disk, with all that it is laid over, into a new image
    Convert(Convert),
}

#[derive(Args)]
struct Create {
    /// Image to make
    path: PathBuf,

    /// Size of the guest's disk: 512M, 2G, or a plain number of MiB
    size: DiskSize,

    /// Format of the image [default: by its name]
    #[arg(long, value_enum)]
    format: Option<ImageFormat>,
}

#[derive(Args)]
#[command(after_help = "\
The base must not be written any more: as a disk of a guest, give it as `--disk BASE,ro`. The overlay grows with \
what its guest writes. Guests take a base from the folder of the overlay or below it; one that lies elsewhere needs \
`--disk OVERLAY,backing=anywhere`.")]
struct Overlay {
    /// Image to lay it over
    base: PathBuf,

    /// Overlay to make (qcow2)
    path: PathBuf,

    /// Format of the base [default: by its name]
    #[arg(long, value_enum, value_name = "FORMAT")]
    base_format: Option<ImageFormat>,

    #[command(flatten)]
    trust: Trust,
}

#[derive(Args)]
struct Info {
    /// Image to look at; a guest may use it
    path: PathBuf,

    /// For people or for programs
    #[arg(long = "format", value_enum, default_value_t = Output::Text)]
    output: Output,

    /// Format of the image [default: by its name]
    #[arg(long, value_enum, value_name = "FORMAT")]
    image_format: Option<ImageFormat>,
}

#[derive(Args)]
#[command(after_help = "\
The base changes for everything else that is laid over it, too: other overlays of it are spoilt. The overlay \
stays as it is and may be removed.")]
struct Commit {
    /// Overlay to commit
    overlay: PathBuf,

    /// Format of the overlay [default: by its name]
    #[arg(long, value_enum)]
    format: Option<ImageFormat>,

    #[command(flatten)]
    trust: Trust,
}

#[derive(Args)]
#[command(after_help = "\
The partitions and file systems in it stay as they are: make them larger in the guest (growpart, resize2fs) \
afterwards, or smaller before.")]
struct Resize {
    /// Image to resize
    path: PathBuf,

    /// New size, or +SIZE for so much more
    size: NewSize,

    /// Allow a smaller size; what lies beyond is lost
    #[arg(long)]
    shrink: bool,

    /// Format of the image [default: by its name]
    #[arg(long, value_enum)]
    format: Option<ImageFormat>,

    #[command(flatten)]
    trust: Trust,
}

#[derive(Args)]
#[command(after_help = "\
What a guest wrote is not looked at: its own fsck does that.

Exit status: 0 if the image is sound or has been repaired, 1 if it cannot be checked, 2 for a wrong command line, \
3 if only room is lost (leaked clusters), 4 if data may be lost.")]
struct Check {
    /// Image to check
    path: PathBuf,

    /// Put right what can be
    #[arg(long)]
    repair: bool,

    /// Format of the image [default: by its name]
    #[arg(long, value_enum)]
    format: Option<ImageFormat>,
}

#[derive(Args)]
struct Convert {
    /// Disk to copy
    src: PathBuf,

    /// Image to make
    dst: PathBuf,

    /// Format of SRC [default: by its name]
    #[arg(long, value_enum, value_name = "FORMAT")]
    from: Option<ImageFormat>,

    /// Format of DST [default: by its name]
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<ImageFormat>,

    #[command(flatten)]
    trust: Trust,
}

#[derive(Args)]
struct Trust {
    /// Allow bases outside of the folder of the image (for guests that is `--disk PATH,backing=anywhere`)
    #[arg(long)]
    base_anywhere: bool,
}

impl Trust {
    fn backing(&self) -> Backing {
        if self.base_anywhere {
            Backing::Anywhere
        } else {
            Backing::BesideImage
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ImageFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

pub(crate) fn disk(args: &DiskArgs) -> anyhow::Result<ExitCode> {
    let said = match &args.act {
        Act::Create(args) => create(args)?,
        Act::Overlay(args) => overlay(args)?,
        Act::Info(args) => info(args)?,
        Act::Commit(args) => commit(args)?,
        Act::Resize(args) => resize(args)?,
        Act::Check(args) => return check(args),
        Act::Convert(args) => convert(args)?,
    };
    crate::print(&said)?;
    Ok(ExitCode::SUCCESS)
}

// Formats --------------------------------------------------------------------------------------

fn format_of_new(path: &Path, said: Option<ImageFormat>) -> Format {
    match said {
        Some(ImageFormat::Raw) => Format::Raw,
        Some(ImageFormat::Qcow2) => Format::Qcow2,
        None => Format::by_name(path),
    }
}

/// The format of an image that is there. One that is raw by its name alone and looks like something else is
/// refused: both could be meant, and one of them costs data.
fn format_of(path: &Path, said: Option<ImageFormat>, option: &str) -> anyhow::Result<Format> {
    let format = format_of_new(path, said);
    if said.is_none() && format == Format::Raw && looks_like_qcow2(path) {
        bail!(
            "cannot tell what {} is: by its name it is raw, its content looks like qcow2; say {option} qcow2, or \
             {option} raw if a guest wrote that to its disk",
            path.display()
        );
    }
    Ok(format)
}

fn looks_like_qcow2(path: &Path) -> bool {
    tools::info(path, Format::Qcow2).is_ok()
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}

/// `alveole run` goes by names, too.
fn hint_at_name(path: &Path, format: Format) {
    if Format::by_name(path) != format {
        let (path, name) = (path.display(), name(format));
        crate::hint(&format!(
            "hint: the name does not say that this is {name}: write --disk {path},format={name} for a guest"
        ));
    }
}

// Errors ---------------------------------------------------------------------------------------

/// A tool's error with what a person can do about it, where the tool does not say.
#[expect(clippy::needless_pass_by_value, reason = "as map_err has it")]
fn mend(error: ToolError) -> anyhow::Error {
    let making = matches!(error, ToolError::Io { act: "make", .. });
    let cure = match &error {
        // What could not be made is not there.
        ToolError::Open(OpenError::Image { path, .. })
            if cause(&error).is_none() && path.exists() =>
        {
            "; say the format if it is another"
        }
        ToolError::Open(OpenError::Backing { image, backing, .. })
            if !lies_beside(&image.with_file_name(backing), image) =>
        {
            " (here: --base-anywhere)"
        }
        _ => match cause(&error) {
            Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => {
                "; make room in that file system, then do it again"
            }
            Some(rustix::io::Errno::FBIG) => "; its file system has no files that large",
            Some(rustix::io::Errno::NOENT) if making => "; make the folder first",
            Some(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS) if making => {
                "; choose a folder that you may write to"
            }
            _ => "",
        },
    };
    // Its text has its causes in it.
    anyhow!("{error}{cure}")
}

/// What the host said, if it was the host.
fn cause(error: &ToolError) -> Option<rustix::io::Errno> {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(e) = error.downcast_ref::<io::Error>() {
            return rustix::io::Errno::from_io_error(e);
        }
        next = error.source();
    }
    None
}

// Making ---------------------------------------------------------------------------------------

fn create(args: &Create) -> anyhow::Result<String> {
    let (path, size_bytes) = (&args.path, args.size.bytes());
    let format = format_of_new(path, args.format);
    match format {
        Format::Raw => tools::create_raw(path, size_bytes),
        Format::Qcow2 => tools::create_qcow2(path, size_bytes, CLUSTER_BITS),
    }
    .map_err(mend)?;
    hint_at_name(path, format);
    Ok(made(path, size_bytes, format))
}

fn made(path: &Path, size_bytes: u64, format: Format) -> String {
    let (path, size, name) = (path.display(), human(size_bytes), name(format));
    format!("made {path}: a disk of {size}, {name}\n")
}

fn overlay(args: &Overlay) -> anyhow::Result<String> {
    let (base, path) = (&args.base, &args.path);
    if !base.exists() && path.exists() {
        bail!(
            "cannot lay an image over {}: it is not there; the base comes first, then the overlay to make",
            base.display()
        );
    }
    let format = format_of(base, args.base_format, "--base-format")?;
    if !args.trust.base_anywhere && !lies_beside(base, path) {
        bail!(
            "cannot lay {} over {}: guests take a base from the folder of the overlay or below it; make the overlay \
             there, or say --base-anywhere here and backing=anywhere to guests",
            path.display(),
            base.display()
        );
    }
    tools::create_overlay(path, base, format).map_err(mend)?;
    hint_at_name(path, Format::Qcow2);
    Ok(format!(
        "made {}: over {} ({}), which must stay as it is now\n",
        path.display(),
        base.display(),
        name(format)
    ))
}

/// Whether guests take `base` for `image`. Unknown is yes: then something else is wrong, and is told.
fn lies_beside(base: &Path, image: &Path) -> bool {
    let folder = match image.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match (fs::canonicalize(base), fs::canonicalize(folder)) {
        (Ok(base), Ok(folder)) => base.starts_with(folder),
        _ => true,
    }
}

fn convert(args: &Convert) -> anyhow::Result<String> {
    let from = format_of(&args.src, args.from, "--from")?;
    let to = format_of_new(&args.dst, args.to);
    tools::convert(&args.src, from, &args.dst, to, args.trust.backing()).map_err(mend)?;
    hint_at_name(&args.dst, to);
    let info = tools::info(&args.dst, to).map_err(mend)?;
    Ok(made(&args.dst, info.size_bytes, to))
}

// Changing -------------------------------------------------------------------------------------

fn commit(args: &Commit) -> anyhow::Result<String> {
    let path = &args.overlay;
    if format_of(path, args.format, "--format")? == Format::Raw {
        bail!(
            "cannot commit {}: it is raw, and only qcow2 images are laid over others; say --format qcow2 if it is \
             one",
            path.display()
        );
    }
    tools::commit(path, args.trust.backing()).map_err(mend)?;
    let base = tools::info(path, Format::Qcow2).map_err(mend)?.backing;
    Ok(format!(
        "wrote what {path} holds into {base}; {path} may be removed\n",
        path = path.display(),
        base = base.unwrap_or_default().display(),
    ))
}

fn resize(args: &Resize) -> anyhow::Result<String> {
    let path = &args.path;
    let format = format_of(path, args.format, "--format")?;
    let old = tools::info(path, format).map_err(mend)?.size_bytes;
    let new = match args.size {
        NewSize::To(size) => size.bytes(),
        NewSize::By(more) => old.saturating_add(more.bytes()),
    };
    if new < old && !args.shrink {
        bail!(
            "cannot shrink {} from {} to {}: what lies beyond would be lost; --shrink does it all the same",
            path.display(),
            human(old),
            human(new)
        );
    }
    tools::resize(path, format, new, args.shrink, args.trust.backing()).map_err(mend)?;
    Ok(format!(
        "{}: {}, was {}\n",
        path.display(),
        human(new),
        human(old)
    ))
}

// Looking --------------------------------------------------------------------------------------

fn check(args: &Check) -> anyhow::Result<ExitCode> {
    let path = &args.path;
    let info = tools::info(path, format_of(path, args.format, "--format")?).map_err(mend)?;
    let Some(qcow2) = info.qcow2 else {
        bail!(
            "cannot check {}: a raw image has no tables that could be wrong; say --format qcow2 if it is one",
            path.display()
        );
    };
    let repair = if args.repair { Repair::All } else { Repair::No };
    let report = tools::check(path, repair).map_err(mend)?;
    crate::print(&check_text(path, &report, qcow2.dirty, args.repair))?;
    Ok(match (report.corruptions, report.leaks) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => LEAKS.into(),
        _ => DAMAGED.into(),
    })
}

fn check_text(path: &Path, report: &Report, dirty: bool, repaired: bool) -> String {
    let path = path.display();
    let mut text = String::new();
    for finding in &report.findings {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{path}: {finding}");
    }
    let fixed = report.corruptions_fixed.saturating_add(report.leaks_fixed);
    if fixed > 0 {
        let _ = writeln!(
            text,
            "{path}: repaired: {} faults, {} lost clusters",
            report.corruptions_fixed, report.leaks_fixed
        );
    }
    if report.corruptions == 0 && report.leaks == 0 {
        let _ = writeln!(text, "{path}: sound");
        return text;
    }
    let _ = write!(
        text,
        "{path}: {} faults, {} lost clusters",
        report.corruptions, report.leaks
    );
    text.push_str(match (dirty, repaired, report.corruptions) {
        (true, false, _) => {
            ": it was not closed cleanly; --repair puts that right, and so does the next guest that writes to it\n"
        }
        (false, false, 0) => ": only room is lost; --repair frees it\n",
        (false, false, _) => ": data may be lost; make a copy of the file, then try --repair\n",
        (_, true, _) => " are left: take what can be read by `alveole disk convert`\n",
    });
    text
}

fn info(args: &Info) -> anyhow::Result<String> {
    let path = &args.path;
    let format = format_of_new(path, args.image_format);
    let found = tools::info(path, format).map_err(mend)?;
    let maybe_qcow2 =
        args.image_format.is_none() && format == Format::Raw && looks_like_qcow2(path);
    if maybe_qcow2 {
        crate::hint(
            "hint: by its name it is raw, but its content looks like qcow2: if it is, say --image-format qcow2 here, \
             and format=qcow2 to guests",
        );
    }
    match args.output {
        Output::Text => Ok(info_text(path, &found)),
        Output::Json => info_json(path, &found, maybe_qcow2),
    }
}

fn info_text(path: &Path, info: &ImageInfo) -> String {
    let mut lines = vec![("image", path.display().to_string())];
    lines.push((
        "format",
        match &info.qcow2 {
            None => name(info.format).into(),
            Some(qcow2) => format!(
                "qcow2, version {}, clusters of {}",
                qcow2.version,
                human(qcow2.cluster_size_bytes)
            ),
        },
    ));
    let size = info.size_bytes;
    lines.push(("size", format!("{} ({size} bytes)", human(size))));
    lines.push(("takes", format!("{} on this host", human(info.used_bytes))));
    if let Some(qcow2) = &info.qcow2 {
        if let Some(base) = &qcow2.backing {
            let format = base.format.as_deref().unwrap_or("no format said");
            lines.push(("over", format!("{} ({format})", base.path)));
            match &info.backing {
                None => lines.push((
                    "",
                    "which is not there: bring it back, or nothing can be read".into(),
                )),
                Some(base) if !lies_beside(base, path) => lines.push((
                    "",
                    "outside of this image's folder: guests take it only with backing=anywhere"
                        .into(),
                )),
                Some(_) => {}
            }
        }
        if qcow2.snapshots > 0 {
            let text = format!("{}, out of reach for guests", qcow2.snapshots);
            lines.push(("snapshots", text));
        }
        // In use it always is.
        if qcow2.dirty && info.in_use.is_none() {
            let text = "not closed cleanly; the next guest that writes to it puts that right";
            lines.push(("state", text.into()));
        }
        if qcow2.corrupt {
            let text = "marked as damaged; see alveole disk check";
            lines.push(("state", text.into()));
        }
    }
    if let Some(holder) = &info.in_use {
        lines.push(("in use", holder.clone()));
    }
    let mut text = String::new();
    for (what, value) in lines {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{what:9}  {value}");
    }
    text
}

/// What programs read. Keys are only ever added.
#[derive(Serialize)]
struct Shown<'a> {
    path: &'a Path,
    format: &'static str,
    size_bytes: u64,
    used_bytes: u64,
    /// The format is what the name says, and the content looks different.
    looks_like_qcow2: bool,
    in_use: Option<&'a str>,
    base: Option<ShownBase<'a>>,
    qcow2: Option<ShownQcow2>,
}

#[derive(Serialize)]
struct ShownBase<'a> {
    /// As it is written in the image.
    name: &'a str,
    format: Option<&'a str>,
    /// Where it is, if it is there.
    path: Option<&'a Path>,
}

#[derive(Serialize)]
struct ShownQcow2 {
    version: u32,
    cluster_size_bytes: u64,
    lazy_refcounts: bool,
    snapshots: u32,
    dirty: bool,
    corrupt: bool,
}

fn info_json(path: &Path, info: &ImageInfo, maybe_qcow2: bool) -> anyhow::Result<String> {
    let base = info.qcow2.as_ref().and_then(|q| q.backing.as_ref());
    let shown = Shown {
        path,
        format: name(info.format),
        size_bytes: info.size_bytes,
        used_bytes: info.used_bytes,
        looks_like_qcow2: maybe_qcow2,
        in_use: info.in_use.as_deref(),
        base: base.map(|base| ShownBase {
            name: &base.path,
            format: base.format.as_deref(),
            path: info.backing.as_deref(),
        }),
        qcow2: info.qcow2.as_ref().map(|q| ShownQcow2 {
            version: q.version,
            cluster_size_bytes: q.cluster_size_bytes,
            lazy_refcounts: q.lazy_refcounts,
            snapshots: q.snapshots,
            dirty: q.dirty,
            corrupt: q.corrupt,
        }),
    };
    let json =
        serde_json::to_string_pretty(&shown).context("cannot write what was found as JSON")?;
    Ok(json + "\n")
}
