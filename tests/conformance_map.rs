//! The maps from clauses of the virtio specification to tests: each crate has one, each clause of each section has
//! one row, each row names a test or a reason, and each test that is named is there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Where the steps of the suite are, which rows name as `conformance::x`.
const SUITE: &str = "crates/virtio/src/testing/conformance.rs";
/// What the specification's text has, counted once: map, clauses, sections. A map that says otherwise has lost
/// a section.
const CLAUSES: [(&str, usize, usize); 7] = [
    ("virtio", 82, 20),
    ("virtio-blk", 49, 2),
    ("virtio-mmio", 12, 1),
    ("virtio-net", 75, 12),
    ("virtio-pci", 60, 15),
    ("virtio-rng", 1, 1),
    ("virtio-vsock", 7, 4),
];

/// Whether there is such a test: a function right under `#[test]`, or a step that the suite runs.
fn has_test(root: &Path, name: &str) -> bool {
    let (file, marks) = match name.strip_prefix("conformance::") {
        Some(step) => (SUITE, vec![format!(", &{step});")]),
        None => {
            let (file, function) = name.split_once("::").unwrap_or((name, ""));
            let indents = ["", "    "];
            let mark = |indent| format!("\n{indent}#[test]\n{indent}fn {function}(");
            (file, indents.map(mark).to_vec())
        }
    };
    let text = fs::read_to_string(root.join(file)).unwrap_or_default();
    marks.iter().any(|mark| text.contains(mark))
}

/// Section, first and last clause, and how many the section has: `2.7.7.2: 1 of 6`, `2.8.12: 1-2 of 2`.
fn clauses(cell: &str) -> Option<(&str, usize, usize, usize)> {
    let (section, rest) = cell.split_once(": ")?;
    let (which, of) = rest.split_once(" of ")?;
    let (first, last) = which.split_once('-').unwrap_or((which, which));
    let number = |text: &str| text.parse().ok();
    let is_section = section.split('.').all(|part| part.parse::<u8>().is_ok());
    is_section.then_some((section, number(first)?, number(last)?, number(of)?))
}

/// Checks one row; gives the number of tests it names.
fn check_answer(root: &Path, row: &str, answer: &str) -> usize {
    if let Some(reason) = answer.strip_prefix("none: ") {
        assert!(reason.len() > 8, "{row}: no reason");
        return 0;
    }
    let tests: Vec<_> = answer.split('`').skip(1).step_by(2).collect();
    assert!(!tests.is_empty(), "{row}: no test, no reason");
    for test in &tests {
        assert!(has_test(root, test), "there is no test {test}");
    }
    tests.len()
}

#[test]
fn every_clause_has_a_test_that_exists_or_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    let mut maps = Vec::new();
    for entry in fs::read_dir(root.join("crates")).unwrap() {
        let folder = entry.unwrap().path();
        let crate_name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if crate_name != "virtio" && !crate_name.starts_with("virtio-") {
            continue;
        }
        let map = fs::read_to_string(folder.join("conformance.md"))
            .unwrap_or_else(|e| panic!("{crate_name} has no conformance.md: {e}"));
        let rows = map.lines().filter(|l| l.starts_with("| ")).skip(1);
        // By section: how many clauses it has, and which of them have a row.
        let mut sections: BTreeMap<&str, (usize, Vec<usize>)> = BTreeMap::new();
        for row in rows {
            let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [which, _, answer] = cells[..] else {
                panic!("{crate_name}: {row}: not three cells")
            };
            let (section, first, last, of) = clauses(which)
                .unwrap_or_else(|| panic!("{crate_name}: {which}: no section and clauses"));
            let (count, mapped) = sections.entry(section).or_insert((of, Vec::new()));
            assert_eq!(*count, of, "{crate_name}: {which}: other rows say {count}");
            mapped.extend(first..=last);
            named += check_answer(root, row, answer);
        }
        let mut total = 0;
        for (section, (count, mut mapped)) in sections.clone() {
            mapped.sort_unstable();
            let all: Vec<_> = (1..=count).collect();
            assert_eq!(mapped, all, "{crate_name}: clauses of section {section}");
            total += count;
        }
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        let (s, ss) = (plural(total), plural(sections.len()));
        let said = format!("{total} clause{s} in {} section{ss}.", sections.len());
        assert!(map.contains(&said), "{crate_name} does not say: {said}");
        maps.push((crate_name, total, sections.len()));
    }
    maps.sort_unstable();
    let maps: Vec<_> = maps.iter().map(|(n, c, s)| (n.as_str(), *c, *s)).collect();
    assert_eq!(maps, CLAUSES);
    assert!(named > 100, "{named} tests are named");
}
