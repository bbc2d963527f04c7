//! The thread that serves the API.

use std::io;
use std::thread::JoinHandle;

use alveole_event_loop::{EventLoop, EventLoopError, LoopHandle, Worker};
use alveole_thread_sandbox::Role;

use crate::ApiSocket;
use crate::server::{SendRequest, Server};

/// Why the API could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its descriptors.
    #[error("cannot serve the API: {0}; raise the limit on open files (ulimit -n)")]
    Descriptor(#[source] io::Error),
    /// Its event loop.
    #[error("cannot serve the API: {0}")]
    Loop(#[from] EventLoopError),
    /// Its thread.
    #[error(
        "cannot start the thread of the API: {0}; is the limit on processes (ulimit -u) reached?"
    )]
    Thread(#[source] io::Error),
}

/// The thread that serves the API. Dropping it ends it; the socket is removed then.
#[derive(Debug)]
pub struct ApiThread {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

struct Handle(LoopHandle);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LoopHandle")
    }
}

impl ApiThread {
    /// Starts it. It confines itself as its first act, then serves clients of `socket`: bodies of up to
    /// `max_body_bytes`, requests to `send`. `workers` live on its loop, too; `failed` is called with the reason
    /// should it not go on.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn start(
        socket: ApiSocket,
        max_body_bytes: usize,
        send: SendRequest,
        workers: Vec<Box<dyn Worker>>,
        failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, StartError> {
        let mut event_loop = EventLoop::new()?;
        let server = Server::new(socket, max_body_bytes, send).map_err(StartError::Descriptor)?;
        let server = event_loop.attach(Box::new(server))?;
        for worker in workers {
            event_loop.attach(worker)?;
        }
        let handle = event_loop.handle();
        let body = move || {
            let served = alveole_thread_sandbox::enter(Role::Api, "api").map_err(|e| e.to_string());
            let served = served.and_then(|()| event_loop.run().map_err(|e| e.to_string()));
            if let Ok(worker) = event_loop.detach(server)
                && let Ok(server) = worker.downcast::<Server>()
            {
                server.finish();
            }
            if let Err(why) = served {
                failed(why);
            }
        };
        let thread = std::thread::Builder::new()
            .name("api".into())
            .stack_size(alveole_thread_sandbox::STACK_BYTES)
            .spawn(body)
            .map_err(StartError::Thread)?;
        Ok(Self {
            handle: Handle(handle),
            thread: Some(thread),
        })
    }

    /// Ends it: answers that are there already are written, as far as clients take them at once.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.handle.0.stop();
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

impl Drop for ApiThread {
    fn drop(&mut self) {
        self.stop();
    }
}
