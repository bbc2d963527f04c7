//! Where kernels, VMs and disks for them are.

use std::path::PathBuf;

use alveole_guest_kernel::KernelStore;
use alveole_image::{ImageError, Store};
use alveole_instance::{Snapshots, Vms, Volumes};

/// Everything is below this folder, if it is set.
pub(crate) const HOME_VARIABLE: &str = "ALVEOLE_HOME";
/// Images and kernels are in this folder, if it is set.
pub(crate) const DATA_VARIABLE: &str = "ALVEOLE_DATA";

/// A folder that the environment names.
fn folder(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    path.filter(|p| p.is_absolute())
}

/// Folders of this user (XDG base directory specification 0.8), or of the system for root.
pub(crate) struct Places {
    /// What is the same for all VMs and can be had again: images, kernels.
    pub(crate) data: PathBuf,
    /// VMs.
    state: PathBuf,
    /// Sockets.
    run: PathBuf,
}

impl Places {
    pub(crate) fn usual() -> Self {
        let mut places = Self::of_this_user();
        if let Some(data) = folder(DATA_VARIABLE) {
            places.data = data;
        }
        places
    }

    fn of_this_user() -> Self {
        if let Some(home) = folder(HOME_VARIABLE) {
            return Self {
                data: home.join("data"),
                state: home.join("state"),
                run: home.join("run"),
            };
        }
        if rustix::process::geteuid().is_root() {
            return Self {
                data: "/var/lib/alveole".into(),
                state: "/var/lib/alveole".into(),
                run: "/run/alveole".into(),
            };
        }
        let home = folder("HOME").unwrap_or_else(std::env::temp_dir);
        let data = folder("XDG_DATA_HOME").unwrap_or_else(|| home.join(".local/share"));
        let state = folder("XDG_STATE_HOME").unwrap_or_else(|| home.join(".local/state"));
        let run = folder("XDG_RUNTIME_DIR").unwrap_or_else(|| state.clone());
        Self {
            data: data.join("alveole"),
            state: state.join("alveole"),
            run: run.join("alveole"),
        }
    }

    pub(crate) fn kernels(&self) -> KernelStore {
        KernelStore::new(&self.data.join("kernels"))
    }

    pub(crate) fn images(&self) -> Result<Store, ImageError> {
        Store::open(&self.data.join("images"))
    }

    pub(crate) fn vms(&self) -> Vms {
        Vms::new(&self.state.join("vms"), &self.run.join("vm"))
    }

    pub(crate) fn volumes(&self) -> Volumes {
        Volumes::new(&self.state.join("volumes"))
    }

    /// Beside the VMs, whose files they share.
    pub(crate) fn snapshots(&self) -> Snapshots {
        Snapshots::new(&self.state.join("snapshots"))
    }

    /// Descriptions of pools.
    pub(crate) fn pools(&self) -> PathBuf {
        self.state.join("pools")
    }

    /// Empty disks, to be copied.
    pub(crate) fn empty_disks(&self) -> PathBuf {
        self.data.join("empty-disks")
    }
}
