//! How long the pages of a memory file take to come, by what is put in at once:
//! `cargo run --release -p alveole-page-server --example touch -- MEMORY`.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot go on says where"
)]

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::time::Instant;

use alveole_guest_memory::{GuestRam, HostPages, MemoryPlan, PageServer};
use alveole_page_server::{Memory, Serving, serve};

fn main() {
    let path = std::env::args().nth(1).expect("say which memory file");
    let open = || Memory::open(File::open(&path).unwrap(), 16 << 20).unwrap();
    let pages = open().pages_bytes() / 4096;
    for at_once_kib in [4, 16, 64, 256, 1024] {
        for (order, step) in [("in order", 1), ("far apart", 10_007)] {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("s");
            let listener = UnixListener::bind(&socket).unwrap();
            let mut memory = open();
            let serving = Serving {
                once: true,
                at_once_bytes: at_once_kib << 10,
            };
            let server = std::thread::spawn(move || serve(listener, &mut memory, serving, |_| ()));
            let connection = PageServer::connect(&socket).unwrap();
            let plan = MemoryPlan::around_hole(pages * 4096).unwrap();
            let ram = GuestRam::map_served(&plan, &connection, HostPages::Anonymous).unwrap();
            let begun = Instant::now();
            // A twentieth of them, as a guest that goes on touches.
            for page in 0..pages / 20 {
                let page = page * step % pages;
                ram.read_plain::<u8>(page * 4096).unwrap();
            }
            let per_page = begun.elapsed().as_secs_f64() * 1e6 / (pages / 20) as f64;
            drop((connection, ram));
            server.join().unwrap().unwrap();
            println!("{at_once_kib:5} KiB at once, {order:9}: {per_page:7.1} us a page");
        }
    }
}
