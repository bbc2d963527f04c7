//! The VMMs: how each is found and told to run the one guest. The only place that knows them.
//!
//! Does not know what is measured, nor how often.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::json;

/// What kind of command line a VMM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Alveole,
    Firecracker,
    CloudHypervisor,
    Qemu,
}

impl Kind {
    const ALL: [Self; 4] = [
        Self::Alveole,
        Self::Firecracker,
        Self::CloudHypervisor,
        Self::Qemu,
    ];

    /// What a VMM's name in the tables begins with.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Alveole => "alveole",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Qemu => "qemu",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Alveole => "alveole-vmm",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Qemu => "qemu-system-x86_64",
        }
    }

    fn of(name: &str) -> Option<Self> {
        let fits = |kind: &Self| {
            name.strip_prefix(kind.name())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        Self::ALL.into_iter().find(fits)
    }
}

/// One column of the table.
#[derive(Debug, Clone)]
pub(crate) struct Vmm {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    /// The first line of `--version`.
    pub(crate) version: String,
    /// QEMU: this KVM refuses IA32_ARCH_CAPABILITIES, which QEMU would set and die.
    pub(crate) without_arch_capabilities: bool,
}

/// The kernel arguments that a round is run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// What issue and Firecracker's guides give.
    Given,
    /// The same, but nothing is said on the console and no keyboard is probed for.
    Fast,
}

impl Arguments {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Fast => "fast",
        }
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Given => "console=ttyS0 quiet reboot=k panic=-1 nomodule tsc=reliable",
            Self::Fast => {
                "console=ttyS0 quiet reboot=k panic=-1 nomodule tsc=reliable \
                 loglevel=1 i8042.noaux i8042.nokbd"
            }
        }
    }
}

/// What the guest's init does when it has said that it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// End the guest so that the VMM ends.
    End,
    /// Wait to be looked at.
    Wait,
}

/// The one guest that all VMMs run.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u32,
    pub(crate) arguments: Arguments,
    pub(crate) then: Then,
}

/// The VMMs on this machine: ours, then each peer from `PATH`, unless `given` (NAME=PATH) says where.
/// Also returns a line for each that is not there.
///
/// # Errors
/// A `given` that is not NAME=PATH, whose name no known VMM has, or whose path is no file; a name in
/// `only` that there is not.
pub(crate) fn find(
    ours: &Path,
    given: &[String],
    only: &[String],
) -> anyhow::Result<(Vec<Vmm>, Vec<String>)> {
    let mut named = Vec::new();
    for text in given {
        let (name, path) = text
            .split_once('=')
            .with_context(|| format!("--vmm {text}: not NAME=PATH"))?;
        let kind = Kind::of(name).with_context(|| {
            let known: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
            format!(
                "--vmm {text}: the name must begin with one of {}",
                known.join(", ")
            )
        })?;
        let path = fs::canonicalize(path).with_context(|| format!("--vmm {text}"))?;
        named.push((name.to_owned(), kind, path));
    }
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for kind in Kind::ALL {
        let wanted = only.is_empty() || only.iter().any(|name| name == kind.name());
        if wanted && !named.iter().any(|(name, ..)| name == kind.name()) {
            let path = if kind == Kind::Alveole {
                Some(ours.to_path_buf()).filter(|path| path.is_file())
            } else {
                in_path(kind.program())
            };
            match path {
                Some(path) => found.push(new(kind.name().to_owned(), kind, path)),
                None => missing.push(format!(
                    "{} IS NOT MEASURED: {} is not {}; say where it is with --vmm {}=PATH",
                    kind.name(),
                    kind.program(),
                    if kind == Kind::Alveole {
                        "built"
                    } else {
                        "in PATH"
                    },
                    kind.name(),
                )),
            }
        }
        for (name, _, path) in named.iter().filter(|(_, of, _)| *of == kind) {
            if only.is_empty() || only.contains(name) {
                found.push(new(name.clone(), kind, path.clone()));
            }
        }
    }
    let known = |name: &String| Kind::of(name).is_some_and(|kind| kind.name() == name);
    for name in only {
        if !known(name) && !found.iter().any(|vmm| &vmm.name == name) {
            bail!("--only {name}: there is no such VMM (nor a --vmm {name}=PATH)");
        }
    }
    Ok((found, missing))
}

fn new(name: String, kind: Kind, path: PathBuf) -> Vmm {
    let version = match Command::new(&path).arg("--version").output() {
        Ok(said) if said.status.success() => String::from_utf8_lossy(&said.stdout)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
        _ => "says no version".to_owned(),
    };
    Vmm {
        name,
        kind,
        path,
        version,
        without_arch_capabilities: false,
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

impl Vmm {
    /// The arguments with which this VMM runs `guest`, its console on stdout. Writes the files that it
    /// reads to `dir`.
    ///
    /// # Errors
    /// A file cannot be written, a path is not UTF-8.
    pub(crate) fn arguments(&self, guest: &Guest, dir: &Path) -> anyhow::Result<Vec<OsString>> {
        let kernel = utf8(&guest.kernel)?;
        let initrd = utf8(&guest.initrd)?;
        let end = match (guest.then, self.kind) {
            (Then::Wait, _) => "wait",
            // It has no power-off.
            (Then::End, Kind::Firecracker) => "restart",
            (Then::End, _) => "off",
        };
        let line = format!("{} bench_end={end}", guest.arguments.text());
        let (cpus, memory) = (guest.cpus, guest.memory_mib);
        let words = match self.kind {
            Kind::Alveole | Kind::Firecracker => {
                let file = dir.join(format!("{}.json", self.name));
                let config = json!({
                    "boot-source": {
                        "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": line,
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": cpus, "mem_size_mib": memory },
                });
                fs::write(&file, config.to_string())
                    .with_context(|| format!("cannot write {}", file.display()))?;
                let file = utf8(&file)?;
                // Neither logs what a guest does: Firecracker would name every port it does not know.
                if self.kind == Kind::Alveole {
                    format!("--no-api\n--console\nstdio\n--config-file\n{file}")
                } else {
                    format!("--no-api\n--level\nError\n--boot-timer\n--config-file\n{file}")
                }
            }
            Kind::CloudHypervisor => format!(
                "--kernel\n{kernel}\n--initramfs\n{initrd}\n--cmdline\n{line}\n--cpus\nboot={cpus}\n\
                 --memory\nsize={memory}M\n--serial\ntty\n--console\noff"
            ),
            Kind::Qemu => {
                let cpu = if self.without_arch_capabilities {
                    "host,-arch-capabilities"
                } else {
                    "host"
                };
                format!(
                    "-no-user-config\n-nodefaults\n-display\nnone\n-no-reboot\n-nic\nnone\n\
                     -M\nmicrovm,pit=on,pic=on,rtc=on,isa-serial=on\n-accel\nkvm\n-cpu\n{cpu}\n\
                     -smp\n{cpus}\n-m\n{memory}\n-kernel\n{kernel}\n-initrd\n{initrd}\n-append\n{line}\n\
                     -serial\nstdio"
                )
            }
        };
        Ok(words.split('\n').map(OsString::from).collect())
    }

    /// After a run that failed and said `stderr`: whether there is something that this VMM cannot do
    /// without here, which is now noted, so that the run is worth another try.
    pub(crate) fn learn(&mut self, stderr: &str) -> bool {
        let wanted = self.kind == Kind::Qemu
            && !self.without_arch_capabilities
            && stderr.contains("failed to set MSR 0x10a");
        self.without_arch_capabilities |= wanted;
        wanted
    }
}

/// A path as every VMM's command line takes it.
///
/// # Errors
/// It is not UTF-8, or has a comma or a line break.
pub(crate) fn utf8(path: &Path) -> anyhow::Result<&str> {
    let text = path
        .to_str()
        .with_context(|| format!("{}: not UTF-8", path.display()))?;
    if text.contains(['\n', ',']) {
        bail!(
            "{text:?}: a path with a comma or a line break does not fit every VMM's command line"
        );
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_kind() {
        assert_eq!(Kind::of("firecracker"), Some(Kind::Firecracker));
        assert_eq!(Kind::of("alveole-before"), Some(Kind::Alveole));
        assert_eq!(Kind::of("qemux"), None);
    }

    #[test]
    fn peers_that_are_missing_are_named_not_fatal() {
        let nowhere = Path::new("/nonexistent/alveole-vmm");
        let only = ["alveole".to_owned()];
        let (found, missing) = find(nowhere, &[], &only).unwrap();
        assert!(found.is_empty());
        assert!(
            missing.len() == 1 && missing[0].contains("alveole"),
            "{missing:?}"
        );
        let (found, _) = find(nowhere, &["alveole=/bin/true".into()], &only).unwrap();
        assert_eq!(found.len(), 1);
        for bad in ["alveole", "nobody=/bin/true", "qemu=/nonexistent/x"] {
            assert!(find(nowhere, &[bad.into()], &[]).is_err(), "{bad}");
        }
        assert!(find(nowhere, &[], &["nobody".into()]).is_err());
    }

    #[test]
    fn one_guest_for_all() {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest {
            kernel: "/k".into(),
            initrd: "/i".into(),
            memory_mib: 128,
            cpus: 1,
            arguments: Arguments::Fast,
            then: Then::End,
        };
        for kind in Kind::ALL {
            let mut vmm = new(kind.name().into(), kind, "/bin/true".into());
            let words = vmm.arguments(&guest, dir.path()).unwrap();
            let mut all = words.join(" ".as_ref()).into_string().unwrap();
            if let Ok(file) = fs::read_to_string(dir.path().join(format!("{}.json", vmm.name))) {
                all += &file;
            }
            let end = if kind == Kind::Firecracker {
                "restart"
            } else {
                "off"
            };
            let line = format!("{} bench_end={end}", Arguments::Fast.text());
            for want in ["/k", "/i", "128", &line] {
                assert!(all.contains(want), "{kind:?}: {want} in {all}");
            }
            assert_eq!(
                vmm.learn("failed to set MSR 0x10a to 0x69"),
                kind == Kind::Qemu
            );
            assert!(!vmm.learn("failed to set MSR 0x10a to 0x69"));
        }
    }
}
