//! The device as a transport and its owner see it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use alveole_virtio::{
    Identity, QueueWorker, RestoreError, SavedState, StartError, StartKit, VirtioDevice,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::board::Board;
use crate::counters::VsockCounters;
use crate::host::{HostSocket, VsockError};
use crate::state::{KIND, VERSION, VsockStateV1};
use crate::worker::{Hub, QUEUES, VsockWorker, lock};
use crate::{MAX_GUEST_CID, MIN_GUEST_CID, QUEUE_SIZE};

/// Type of a socket device (section 5.10.1).
const DEVICE_ID: u16 = 19;
/// VIRTIO_VSOCK_F_STREAM (section 5.10.3)
const STREAM: u64 = 1;
/// VIRTIO_VSOCK_F_NO_IMPLIED_STREAM
const NO_IMPLIED_STREAM: u64 = 1 << 2;
/// Length of the configuration space: the guest's context.
const CONFIG_LEN: u32 = 8;

/// How a device is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// Context of the guest.
    pub guest_cid: u32,
    /// Where it listens on the host; see the crate's head. At most [`crate::MAX_PATH_BYTES`] long.
    pub uds_path: PathBuf,
}

/// The socket device. See the crate's head.
pub struct VirtioVsock {
    hub: Arc<Mutex<Hub>>,
    guest_cid: u32,
    socket: Arc<HostSocket>,
    counters: Arc<VsockCounters>,
}

/// The owner's handle on the device that a machine has. Clones share it.
#[derive(Clone)]
pub struct VsockHandle {
    socket: Arc<HostSocket>,
    counters: Arc<VsockCounters>,
}

impl VirtioVsock {
    /// Listens at the path. Clients that come before the guest's driver wait for it.
    ///
    /// # Errors
    /// The context is reserved, or the path cannot be listened at.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        let guest_cid = config.guest_cid;
        if is_reserved(guest_cid) {
            return Err(VsockError::ReservedCid(guest_cid));
        }
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VsockError::Descriptor)?;
        let socket = Arc::new(HostSocket::listen(&config.uds_path)?);
        let counters = Arc::new(VsockCounters::default());
        let board = Board::new(guest_cid, socket.clone(), counters.clone())
            .map_err(VsockError::Descriptor)?;
        Ok(Self {
            hub: Arc::new(Mutex::new(Hub::new(board, wake))),
            guest_cid,
            socket,
            counters,
        })
    }

    /// A handle for the owner, to be taken before the device is given to a transport.
    #[must_use]
    pub fn handle(&self) -> VsockHandle {
        VsockHandle {
            socket: self.socket.clone(),
            counters: self.counters.clone(),
        }
    }
}

impl VsockHandle {
    /// What the device counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<VsockCounters> {
        &self.counters
    }

    /// Removes the device's socket from the file system, if it is still the one that the device has made.
    /// Connections go on. May be called again; the last one who holds the device does it otherwise.
    pub fn remove_socket(&self) {
        self.socket.remove();
    }
}

/// Section 5.10.4.
fn is_reserved(cid: u32) -> bool {
    !(MIN_GUEST_CID..=MAX_GUEST_CID).contains(&cid)
}

impl VirtioDevice for VirtioVsock {
    fn identity(&self) -> Identity {
        Identity {
            name: "virtio-vsock",
            device_id: DEVICE_ID,
            features: STREAM | NO_IMPLIED_STREAM,
            queue_sizes: vec![QUEUE_SIZE; QUEUES],
            config_len: CONFIG_LEN,
        }
    }

    fn read_config(&self, at: u32, into: &mut [u8]) {
        let bytes = u64::from(self.guest_cid).to_le_bytes();
        let from = bytes.iter().skip(usize::try_from(at).unwrap_or(usize::MAX));
        for (place, byte) in into.iter_mut().zip(from) {
            *place = *byte;
        }
    }

    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn start(&mut self, kit: StartKit) -> Result<Vec<Box<dyn QueueWorker>>, StartError> {
        // Section 5.10.3.2: streams are implied unless the driver has agreed that they are not.
        let streams = kit.features & STREAM != 0 || kit.features & NO_IMPLIED_STREAM == 0;
        lock(&self.hub).board.agree_on_streams(streams);
        Ok(vec![Box::new(VsockWorker::new(
            &self.hub, &kit.ram, kit.queues,
        ))])
    }

    fn reset(&mut self) {
        let Self {
            hub,
            guest_cid: _,
            socket: _,
            counters: _,
        } = self;
        let mut hub = lock(hub);
        hub.clear();
        // A worker that could not be started has left them.
        hub.rings = [const { None }; QUEUES];
    }

    fn save(&self) -> SavedState {
        let state = VsockStateV1 {
            guest_cid: self.guest_cid,
        };
        SavedState::pack(KIND, VERSION, &state)
    }

    /// Connections do not move with a guest. It is told so (section 5.10.6.7), and then learns its context, which
    /// may be another than the saved one, anew.
    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let VsockStateV1 { guest_cid } = saved.unpack(KIND, VERSION)?;
        if is_reserved(guest_cid) {
            return Err(RestoreError::Invalid {
                kind: KIND.into(),
                why: format!("guest_cid {guest_cid} is reserved"),
            });
        }
        let mut hub = lock(&self.hub);
        hub.clear();
        hub.board.moved();
        hub.transport_was_reset = true;
        Ok(())
    }
}
