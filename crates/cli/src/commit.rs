//! `alveole commit`: an image of what was changed in a VM.

use std::process::ExitCode;

use alveole_image::{Limits, Quiet, Recipe, Reference};
use alveole_instance::State;
use anyhow::{anyhow, bail};

use crate::build::{describe, say_image};
use crate::guests::{Maker, changes};
use crate::places::Places;

#[derive(clap::Args)]
#[command(after_help = "\
The image has the layers of the VM's own image and one more, with what was changed: files, owners, modes, attributes, links, and what was removed. What lies in \
/dev, /proc, /sys and /run is no part of it, nor /etc/hosts, /etc/hostname and /etc/resolv.conf, which are the guest's own. How it is run is what the VM's image \
says, without what `alveole run` was told; --change says it otherwise.

The disk of a VM that runs is held still meanwhile, so that programs wait which write. One that does not run is started for this, without its process and its network.")]
pub(crate) struct CommitArgs {
    /// How the image is described otherwise, as a recipe says it: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR; repeatable
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,

    /// Do not hold the disk still: programs go on, and files may be caught half-written
    #[arg(long)]
    no_freeze: bool,

    /// The VM
    vm: String,

    /// What the image is called [the VM's name]
    name: Option<Reference>,
}

pub(crate) fn commit(args: &CommitArgs) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    let vm = places.vms().find(&args.vm)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => vm.name.parse()?,
    };
    let acts = args
        .change
        .iter()
        .map(|text| Recipe::change(text))
        .collect::<Result<Vec<_>, _>>();
    let acts = acts.map_err(|e| anyhow!("--change: {}", e.why))?;
    let store = places.images()?;
    let mut draft = store.draft(Limits::default(), None)?;
    // The image may have been removed since, and a disk never was one.
    match store.resolve(&vm.record.image_id) {
        Ok(image) if image.root_disk == vm.record.root_disk => draft.over(&image)?,
        _ => draft.over_disk(&vm.record.root_disk)?,
    }
    for act in &acts {
        describe(&mut draft.config, act, &|_| None)?;
    }
    let received = match vm.state()? {
        State::Kept(phase) if phase.phase == "running" => changes(&vm, &draft, !args.no_freeze)?,
        State::Kept(_) => bail!(
            "the VM '{}' is just starting or ending: try again when it is not",
            vm.name
        ),
        _ => {
            let maker = Maker::of(&vm)?;
            let received = changes(&vm, &draft, false);
            maker.end()?;
            received?
        }
    };
    draft.take(received)?;
    draft.is_of_now();
    let image = draft.finish(&name, &Quiet)?;
    say_image(&image, &name)?;
    Ok(ExitCode::SUCCESS)
}
