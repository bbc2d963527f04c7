//! A queue on files: what is the same whatever lies in them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use crate::carrier::Carrier;
use crate::gate::{SharedCarrier, lock};
use crate::host_file::HostFile;
use crate::{Completion, Geometry, Request, StoreError, StoreQueue};

/// What all queues of one store share.
pub(crate) trait Behind: Send + Sync + 'static {
    /// The files that the engine works on; the first is the image itself.
    fn files(&self) -> Arc<[Arc<HostFile>]>;
    /// Whether the engine is io_uring.
    fn uring(&self) -> bool;
    /// What the store looks like now.
    fn geometry(&self) -> Geometry;
    /// Checks and translates a request, and hands it to the carrier.
    fn submit(&self, carrier: &SharedCarrier, request: Request);
}

pub(crate) struct FileQueue<B> {
    behind: Arc<B>,
    carrier: SharedCarrier,
    event: Option<Arc<OwnedFd>>,
}

/// Opens `count` queues, each with an engine of its own.
pub(crate) fn open_queues<B: Behind>(
    behind: &Arc<B>,
    count: usize,
    depth: u32,
) -> Result<Vec<Box<dyn StoreQueue>>, StoreError> {
    (0..count)
        .map(|_| -> Result<Box<dyn StoreQueue>, StoreError> {
            let files = behind.files();
            let image = Arc::clone(&files[0]);
            let carrier =
                Carrier::new(files, behind.uring(), depth).map_err(|(what, source)| {
                    StoreError::Queue {
                        path: image.path().to_owned(),
                        depth,
                        what,
                        source,
                    }
                })?;
            let event = carrier.event().cloned();
            let carrier = Arc::new(Mutex::new(carrier));
            image.gate().add(&carrier);
            Ok(Box::new(FileQueue {
                behind: Arc::clone(behind),
                carrier,
                event,
            }))
        })
        .collect()
}

impl<B: Behind> StoreQueue for FileQueue<B> {
    fn submit(&mut self, request: Request) {
        self.behind.submit(&self.carrier, request);
    }

    fn kick(&mut self, done: &mut Vec<Completion>) {
        let mut carrier = lock(&self.carrier);
        carrier.run();
        carrier.hand_out(done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(|e| e.as_fd())
    }

    fn has_news(&mut self) -> bool {
        lock(&self.carrier).has_news()
    }

    fn stop_event(&mut self) {
        lock(&self.carrier).stop_event();
    }

    fn want_event(&mut self) -> bool {
        lock(&self.carrier).want_event()
    }

    fn collect(&mut self, done: &mut Vec<Completion>) {
        self.kick(done);
    }

    fn in_flight(&self) -> usize {
        lock(&self.carrier).in_flight()
    }

    fn drain(&mut self, done: &mut Vec<Completion>) {
        let mut carrier = lock(&self.carrier);
        carrier.finish_all();
        carrier.hand_out(done);
    }

    fn geometry(&self) -> Geometry {
        self.behind.geometry()
    }
}
