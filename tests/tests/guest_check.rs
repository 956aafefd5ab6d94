//! The check of the workload guest finds every kind of damage that a bad move could do, one page among all.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::godwit::Node;
use godwit_tests::guest_memory::PAGE_BYTES;
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::wait;
use godwit_tests::workload::{self, Workload};
use libtest_mimic::Trial;

const LIMIT: Duration = Duration::from_secs(40);

/// In the working set.
const WORKED_PAGE: u64 = 32 << 20;
/// Filled at boot, never written again.
const FILLED_PAGE: u64 = 100 << 20;
/// Never written.
const EMPTY_PAGE: u64 = 200 << 20;

fn main() {
    let mut tests: Vec<Trial> = Vec::new();
    for order in ["seq", "random", "hot-cold"] {
        for write in ["word", "page"] {
            for contents in ["random", "compressible"] {
                let workload = Workload { order, write, contents, seed: 5, ..Workload::default() };
                let name = format!("damage_is_found_{order}_{write}_{contents}");
                tests.push(harness::test(name, &[Need::Kvm], move |scene| damage_is_found(scene, &workload)));
            }
        }
    }
    harness::main(tests)
}

fn damage_is_found(scene: &Scene, workload: &Workload) -> Result<()> {
    let node = Node::sender(scene, "machine", None, workload, &[])?;
    let memory = node.memory()?;
    let early = memory.page(WORKED_PAGE)?;
    let writes = workload::writes(node.heartbeats(workload.vcpus)?);
    let changed = || Ok(memory.page(WORKED_PAGE)? != early);
    wait::until_true("the page is written again", LIMIT, changed)?;
    ensure!(writes.read(&mut Vec::new()).is_some());
    node.command(&["pause"], &[], LIMIT)?.ensure_code(0)?;
    node.ensure_guest_whole(workload)?;

    let (worked, filled) = (memory.page(WORKED_PAGE)?, memory.page(FILLED_PAGE)?);
    ensure!(worked != early && filled != [0; PAGE_BYTES]);
    let flipped = |page: &[u8; PAGE_BYTES], bit: usize| {
        let mut page = *page;
        page[bit / 8] ^= 1 << (bit % 8);
        page
    };
    let damages = [
        ("a page rolled back", WORKED_PAGE, early),
        ("a bit flipped in a worked page", WORKED_PAGE, flipped(&worked, 12_345)),
        ("a bit flipped in a filled page", FILLED_PAGE, flipped(&filled, 1)),
        ("a bit flipped in an empty page", EMPTY_PAGE, flipped(&[0; PAGE_BYTES], 32_767)),
        ("a worked page dropped", WORKED_PAGE, [0; PAGE_BYTES]),
        ("a filled page dropped", FILLED_PAGE, [0; PAGE_BYTES]),
        ("a page in another's place", FILLED_PAGE, memory.page(FILLED_PAGE + PAGE_BYTES as u64)?),
    ];
    for (what, address, damaged) in damages {
        let whole = memory.page(address)?;
        memory.write(address, &damaged)?;
        let ended = node.command(&["guest", "check"], &["--json"], LIMIT)?;
        ensure!(ended.code == 1, "{what} was not found: {ended}");
        let answer = ended.last_json().context(what)?;
        ensure!(answer["ok"] == false && answer.to_string().contains(&frame(address)), "{what}: {answer}");
        memory.write(address, &whole)?;
        node.ensure_guest_whole(workload).context("after mending")?;
    }
    node.command(&["resume"], &[], LIMIT)?.ensure_code(0)?;
    node.ensure_guest_unharmed(workload)
}

/// How the check names a page.
fn frame(address: u64) -> String {
    format!("{address:#x}")
}
