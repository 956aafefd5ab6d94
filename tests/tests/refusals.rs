//! Preflight names every reason why a move would fail, before any memory is sent, and leaves the guest untouched.

use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::godwit::Node;
use godwit_tests::harness::{self, Need, Scene};
use godwit_tests::workload::Workload;

const LIMIT: Duration = Duration::from_secs(40);
const TCP: &str = "tcp://127.0.0.1:0";

fn main() {
    harness::main(vec![
        harness::test("a_cpu_feature_is_missing", &[Need::Kvm], |scene| {
            refused(scene, &Workload::default(), &["--test-without-cpu", "sse2"], &["cpu:", "sse2"])
        }),
        harness::test("the_tsc_is_another", &[Need::Kvm], |scene| {
            refused(scene, &Workload::default(), &["--test-tsc-khz", "1000000"], &["tsc:", "1000000"])
        }),
        harness::test("too_much_memory", &[Need::Kvm], |scene| {
            let workload = Workload { memory: "128G", fill: "0", working_set: "16M", ..Workload::default() };
            refused(scene, &workload, &[], &["memory:", "128"])
        }),
        harness::test("all_reasons_at_once", &[Need::Kvm], |scene| {
            let receiver = ["--test-without-cpu", "sse2", "--test-without-cpu", "nx", "--test-tsc-khz", "1000000"];
            refused(scene, &Workload::default(), &receiver, &["sse2", "nx", "tsc:"])
        }),
        harness::test("nobody_listens", &[Need::Kvm], nobody_listens),
        harness::test("usage_errors", &[Need::Kvm], usage_errors),
    ])
}

/// The move, and its dry run before, are refused with exit code 3; another receiver then takes the machine.
fn refused(scene: &Scene, workload: &Workload, receiver: &[&str], reasons: &[&str]) -> Result<()> {
    let source = Node::sender(scene, "source", None, workload, &[])?;
    let unfit = Node::receiver(scene, "unfit", None, TCP, receiver)?;
    let uri = unfit.uri()?;
    for more in [&["--dry-run"][..], &[]] {
        let ended = source.move_to(&uri, more, LIMIT)?.ensure_code(3)?.ensure_says(reasons)?;
        let outcome = ended.outcome()?;
        ensure!(outcome["outcome"] == "refused", "{outcome}");
        let told = outcome["reasons"].to_string();
        ensure!(reasons.iter().all(|reason| told.contains(reason)), "not every reason is in the outcome: {told}");
        ensure!(outcome["wire_bytes"].as_u64().is_some_and(|bytes| bytes < 1 << 20), "memory was sent: {outcome}");
    }
    source.ensure_guest_runs(workload.vcpus)?;
    if workload.memory.ends_with('M') {
        source.ensure_guest_whole(workload)?;
        let fit = Node::receiver(scene, "fit", None, TCP, &[])?;
        source.move_to(&fit.uri()?, &[], LIMIT)?.ensure_moved(&fit, workload)?;
    }
    Ok(())
}

fn nobody_listens(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    source.move_to(&format!("tcp://{nobody}"), &[], LIMIT)?.ensure_code(4)?.ensure_says(&[&nobody.to_string()])?;
    source.ensure_guest_unharmed(&workload)
}

fn usage_errors(scene: &Scene) -> Result<()> {
    let workload = Workload::default();
    let source = Node::sender(scene, "source", None, &workload, &[])?;
    for (uri, option) in [("nonsense", "--verify=on"), (TCP, "--max-bandwidth=fast"), (TCP, "--no-such-option")] {
        source.command(&["migrate"], &["--to", uri, option], LIMIT)?.ensure_code(2)?;
    }
    // Clear text off loopback has to be asked for.
    let ended = source.command(&["migrate"], &["--to", "tcp://192.0.2.1:7000"], LIMIT)?;
    ended.ensure_code(2)?.ensure_says(&["--insecure"])?;
    source.ensure_guest_unharmed(&workload)
}
