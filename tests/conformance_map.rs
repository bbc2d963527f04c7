//! The maps from clauses of the virtio specification to tests: each crate has one, each row names a test or a
//! reason, and each test that is named is there.

use std::fs;
use std::path::Path;

/// Where the steps of the suite are, which rows name as `conformance::x`.
const SUITE: &str = "crates/virtio/src/testing/conformance.rs";

fn has_test(root: &Path, name: &str) -> bool {
    let (file, function) = match name.strip_prefix("conformance::") {
        Some(step) => (SUITE, step),
        None => name.split_once("::").unwrap_or((name, "")),
    };
    let text = fs::read_to_string(root.join(file)).unwrap_or_default();
    !function.is_empty() && text.contains(&format!("fn {function}("))
}

#[test]
fn every_clause_has_a_test_that_exists_or_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    let mut maps = 0;
    for entry in fs::read_dir(root.join("crates")).unwrap() {
        let folder = entry.unwrap().path();
        let crate_name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if crate_name != "virtio" && !crate_name.starts_with("virtio-") {
            continue;
        }
        maps += 1;
        let map = fs::read_to_string(folder.join("conformance.md"))
            .unwrap_or_else(|e| panic!("{crate_name} has no conformance.md: {e}"));
        let rows = map.lines().filter(|l| l.starts_with("| ")).skip(1);
        let mut count = 0;
        for row in rows {
            count += 1;
            let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [_, _, answer] = cells[..] else {
                panic!("{crate_name}: {row}: not three cells")
            };
            if let Some(reason) = answer.strip_prefix("none: ") {
                assert!(reason.len() > 8, "{crate_name}: {row}: no reason");
                continue;
            }
            let tests: Vec<_> = answer.split('`').skip(1).step_by(2).collect();
            assert!(!tests.is_empty(), "{crate_name}: {row}: no test, no reason");
            for test in tests {
                assert!(
                    has_test(root, test),
                    "{crate_name}: there is no test {test}"
                );
                named += 1;
            }
        }
        assert!(count > 0, "{crate_name}: the map is empty");
    }
    assert!(maps >= 5 && named > 50, "{maps} maps with {named} tests");
}
