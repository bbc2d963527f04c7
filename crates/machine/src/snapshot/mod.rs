//! Snapshots: what the state of a machine is made of, how it gets into files, and how a machine is built of them.
//!
//! | file | thread | does |
//! |---|---|---|
//! | `gather.rs` | control | lets the machine stand still, and asks every part for its state |
//! | `live.rs` | the same | the same for a guest that runs on: rounds, and the moment |
//! | `write.rs` | `files` | writes memory and state, first beside the files that may be there, then in their place |
//! | `new_file.rs` | the same | makes a file beside the one that it replaces, and puts it into its place |
//! | `load.rs` | main, before any sandbox | reads the state, opens the memory, says what the machine is |
//! | `restore.rs` | the same | puts the state into a machine that was just built |
//! | `served.rs` | one of its own | notices that the process that serves memory is gone |
//! | `working_set.rs` | one of its own | reads what guests of a snapshot touch first, or finds out what that is |
//! | `tools.rs` | main, of a program that runs no machine | looks at snapshots, and makes one of a chain |
//! | `state.rs` | | the forms of what is not a device's |
//!
//! A snapshot is two files, as Firecracker's is: the state (see `alveole_saved_state`), and the memory, page by page, with a
//! mark behind it that says which state it belongs to. Of a diff snapshot, the memory file has the pages that changed, and the state
//! names the memory files before it.

mod gather;
mod live;
mod load;
mod new_file;
mod restore;
mod served;
mod state;
mod tools;
mod working_set;
mod write;

pub(crate) use gather::Tracking;
pub(crate) use load::MemorySource;
pub use load::{LoadError, Prepared, Snapshot};
pub(crate) use restore::{cpu_state, partition_state, restore_devices};
pub(crate) use served::ServerWatch;
pub use state::SNAPSHOT_VERSION;
pub(crate) use state::{LAYOUT, LayerV1, RangeV1};
pub use tools::{Flatten, Flattened, Verified, flatten, verify};
pub(crate) use working_set::WorkingSet;
pub use write::Taken;
pub(crate) use write::{Ahead, SnapshotJob, take};
