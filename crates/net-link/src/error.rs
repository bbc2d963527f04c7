//! Why there is no link.

use std::io;
use std::path::PathBuf;

/// Why a link cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A name that no interface can have.
    #[error(
        "{name:?} is no name of an interface: {why}; interfaces have names of 1 to 15 bytes without '/' and spaces"
    )]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is no such interface.
    #[error("there is no interface {name}; make it: {cure}")]
    Missing {
        /// Its name.
        name: String,
        /// The command that makes one.
        cure: String,
    },
    /// Somebody else has it.
    #[error(
        "{name} is in use: another program (perhaps another VM) has all its queues open; stop that one, or make \
         another tap"
    )]
    Busy {
        /// Its name.
        name: String,
    },
    /// An interface of another kind.
    #[error(
        "{name} cannot be used as a tap: {why}; make one: ip tuntap add dev NAME mode tap vnet_hdr"
    )]
    NotATap {
        /// Its name, or the descriptor.
        name: String,
        /// What it is instead.
        why: String,
    },
    /// A tap for one queue.
    #[error(
        "{name} has one queue, {pairs} are wanted: it was made without multi_queue; make it anew: ip tuntap add dev \
         {name} mode tap multi_queue vnet_hdr; or ask for one pair of queues"
    )]
    OneQueue {
        /// Its name.
        name: String,
        /// How many pairs of queues were asked for.
        pairs: u16,
    },
    /// The host does not let us.
    #[error("no permission to {what}: {source}; {cure}")]
    Permission {
        /// What was to be done.
        what: String,
        /// What the host says.
        source: io::Error,
        /// What to do.
        cure: String,
    },
    /// A device node of the host is not there.
    #[error("cannot open {}: {source}; {cure}", path.display())]
    Node {
        /// Which.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
        /// What to do.
        cure: &'static str,
    },
    /// A socket that cannot be had.
    #[error("cannot {what} {}: {source}; {cure}", path.display())]
    Socket {
        /// What was to be done.
        what: &'static str,
        /// With which socket.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
        /// What to do.
        cure: &'static str,
    },
    /// A descriptor of another kind.
    #[error("descriptor {fd} is no {wanted}; hand over one that is connected")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// What was asked for.
        wanted: &'static str,
    },
    /// What was said to be inherited is not.
    #[error(
        "{numbers:?}: not the numbers of open descriptors of a tap's queues, or of one connected unix socket; name \
         those that this program is started with"
    )]
    NotInherited {
        /// What was given.
        numbers: String,
    },
    /// A link that has one queue by nature.
    #[error("{link} has {has} pair(s) of queues, {pairs} are wanted; ask for {has}")]
    Pairs {
        /// What it is.
        link: String,
        /// How many there are.
        has: usize,
        /// How many were asked for.
        pairs: u16,
    },
    /// A link that vhost cannot have.
    #[error(
        "{link}: the host's kernel serves the queues of taps and macvtaps only (vhost); leave vhost out"
    )]
    NoVhost {
        /// What it is.
        link: String,
    },
    /// Another number of descriptors than queues.
    #[error(
        "{link} has {pairs} pair(s) of queues and {has} descriptor(s) of vhost-net; hand over one for each pair"
    )]
    VhostFds {
        /// What it is.
        link: String,
        /// How many descriptors there are.
        has: usize,
        /// How many pairs there are.
        pairs: usize,
    },
    /// A vhost device that lacks what every driver may use.
    #[error(
        "descriptor {fd}: this vhost lacks features {lacks:#x}; is it of /dev/vhost-net, and the kernel not older than \
         3.19? Leave vhost out otherwise"
    )]
    VhostFeatures {
        /// Its number.
        fd: i32,
        /// What is missing.
        lacks: u64,
    },
    /// A vhost device that was used before.
    #[error(
        "descriptor {fd}: vhost-net is another process's already; open /dev/vhost-net anew for each pair of queues"
    )]
    VhostOwned {
        /// Its number.
        fd: i32,
    },
    /// Another step failed.
    #[error("{link}: cannot {what}: {source}")]
    Step {
        /// What it is.
        link: String,
        /// The step.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
}
