//! How fast an image is imported, beside `umoci unpack` of the same layout and a plain copy of the same bytes:
//! `cargo run --release -p alveole-image --example measure -- FOLDER LAYOUT...`, as root. Each layout has an image `latest`.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use alveole_image::{Import, Limits, Platform, Quiet, Store};

const RUNS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args_os().skip(1);
    let folder = words
        .next()
        .ok_or("give a folder for scratch files and layouts to import")?;
    let folder = Path::new(&folder);
    for layout in words {
        let layout = Path::new(&layout);
        let mut rows = Vec::new();
        for _ in 0..RUNS {
            let work = tempfile::tempdir_in(folder)?;
            sync();
            let began = Instant::now();
            let store = Store::open(&work.path().join("store"))?;
            let how = Import {
                name: Some("x".parse()?),
                platform: Platform::host(),
                limits: Limits::default(),
            };
            let image = store.import(layout, &how, &Quiet)?.remove(0);
            sync();
            let import = began.elapsed();
            let began = Instant::now();
            let name = format!("{}:latest", layout.display());
            let umoci = Command::new("umoci")
                .args(["unpack", "--image", &name])
                .arg(work.path().join("bundle"))
                .output()?;
            sync();
            let umoci = umoci.status.success().then(|| began.elapsed());
            // What cannot be avoided: the root disk's bytes.
            let began = Instant::now();
            let mut to = File::create(work.path().join("copy"))?;
            io::copy(&mut File::open(&image.root_disk)?, &mut to)?;
            sync();
            let copy = began.elapsed();
            let bytes = fs::metadata(&image.root_disk)?.len();
            rows.push((import, umoci, copy, bytes, image.layers_bytes));
        }
        for (import, umoci, copy, bytes, packed) in rows {
            let rate = |time: std::time::Duration| bytes as f64 / 1e6 / time.as_secs_f64();
            writeln!(
                io::stdout(),
                "{}: {:.0} MB of layers, {:.0} MB of root disk: import {:.2} s ({:.0} MB/s), umoci unpack {}, copy and sync {:.2} s ({:.0} MB/s)",
                layout.display(),
                packed as f64 / 1e6,
                bytes as f64 / 1e6,
                import.as_secs_f64(),
                rate(import),
                umoci.map_or("failed".into(), |time| format!(
                    "{:.2} s ({:.0} MB/s)",
                    time.as_secs_f64(),
                    rate(time)
                )),
                copy.as_secs_f64(),
                rate(copy),
            )?;
        }
    }
    Ok(())
}

fn sync() {
    rustix::fs::sync();
}
