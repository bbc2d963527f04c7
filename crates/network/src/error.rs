//! What can go wrong with networks of this host.

use std::io;
use std::path::PathBuf;

use alveole_egress_rules::WordError;

/// A failure, in the words of who asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A word, option or file says something that cannot be meant.
    #[error("{what} '{value}': {why}")]
    Word {
        /// What the value stands for.
        what: &'static str,
        /// The value as it was given.
        value: String,
        /// Why not, and what to do.
        why: String,
    },
    /// A description contradicts itself, another network or this host.
    #[error("network '{network}': {why}")]
    Conflict {
        /// The network's name.
        network: String,
        /// What contradicts what, and what to do.
        why: String,
    },
    /// No network has that name.
    #[error(
        "there is no network '{0}': `alveole net ls` shows those that are, `alveole net create` makes one"
    )]
    NoSuchNetwork(String),
    /// A file of the state directory cannot be used.
    #[error("cannot {act} '{}': {source}", path.display())]
    File {
        /// The failed act.
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the state directory holds what no version of this program writes.
    #[error(
        "the state file '{}' is damaged ({why}): put it right, or remove it and make the network anew \
         (interfaces that it has made are then removed by hand: `ip -d link show group {group}`)",
        path.display(), group = crate::kernel::OUR_GROUP
    )]
    DamagedState {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel refused to change its interfaces.
    #[error("cannot {act}: {}", kernel_says(source))]
    Kernel {
        /// The failed act, with its objects.
        act: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program that is needed is not installed.
    #[error(
        "there is no `{program}`: install the package {package} (Debian: apt install {package})"
    )]
    NoProgram {
        /// The program.
        program: &'static str,
        /// The package that brings it.
        package: &'static str,
    },
    /// A program that was run failed.
    #[error("{program} could not {act}: {said}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it was to do.
        act: String,
        /// What it said.
        said: String,
    },
    /// No address of the network is free.
    #[error(
        "no address of network '{network}' is free for VM '{vm}' ({subnet} is used up): \
         stop VMs, or make a network with a larger subnet"
    )]
    NoAddress {
        /// The network.
        network: String,
        /// Who asked.
        vm: String,
        /// The subnet without a free address.
        subnet: String,
    },
    /// A port to be published is taken.
    #[error("port {address}/{protocol} cannot be published: {}", port_says(source))]
    PortTaken {
        /// Address and port on this host.
        address: std::net::SocketAddr,
        /// `tcp` or `udp`.
        protocol: String,
        /// Why.
        source: io::Error,
    },
}

fn port_says(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("{error}; choose another one, or end what has it (`ss -lnp` shows it)")
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "{error}; ports below 1024 are root's (sysctl net.ipv4.ip_unprivileged_port_start): choose a higher one"
            )
        }
        _ => error.to_string(),
    }
}

/// What the kernel said, and what that means here.
fn kernel_says(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => format!(
            "{error}: this needs CAP_NET_ADMIN (run it with sudo, or give the program the capability); \
             without rights there is `--net user`"
        ),
        Some(libc::EOPNOTSUPP) => {
            format!(
                "{error}: this kernel lacks that kind of interface, and no module brings it (try modprobe bridge 8021q macvtap)"
            )
        }
        _ => error.to_string(),
    }
}

impl From<WordError> for Error {
    fn from(WordError { what, value, why }: WordError) -> Self {
        Self::Word { what, value, why }
    }
}

impl Error {
    pub(crate) fn word(what: &'static str, value: &str, why: impl Into<String>) -> Self {
        Self::Word {
            what,
            value: value.to_owned(),
            why: why.into(),
        }
    }

    pub(crate) fn conflict(network: &impl ToString, why: impl Into<String>) -> Self {
        Self::Conflict {
            network: network.to_string(),
            why: why.into(),
        }
    }

    pub(crate) fn file(act: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File {
            act,
            path: path.into(),
            source,
        }
    }

    pub(crate) fn kernel(act: impl Into<String>, source: io::Error) -> Self {
        Self::Kernel {
            act: act.into(),
            source,
        }
    }
}
