//! What a person does where no protocol can decide: with the documented commands, as the documentation says.

use anyhow::{Context, Result, ensure};

use super::claims;
use super::plan::Plan;
use super::world::{END_LIMIT, HOSTS, World};

/// What a process ends with whose machine was started anew elsewhere.
const EXIT_LOST: i32 = 7;

/// The machine's owner is dead: it is started anew.
pub fn succeed(world: &mut World<'_>, plan: &Plan) -> Result<()> {
    let newest = claims::newest(&world.stores.claims())?;
    let home = HOSTS.iter().position(|&host| host == newest.host).context("the newest claim is nobody's")?;
    let other = 1 - home;
    let source_waits = world.owner.node.process.is_running()?;
    let leave_it = source_waits && plan.second_start;
    if source_waits && !leave_it {
        let abandoned = world.owner.node.command(&["abandon"], &["--yes"], END_LIMIT)?;
        ensure!(abandoned.code == 0, "a source that waits for its claims is not abandoned: {abandoned}");
        world.owner.node.process.wait(END_LIMIT).context("a source that was abandoned stays")?;
    }
    // What is left on the other host is a receiver, or a source whose machine is out of date.
    let mut former = if plan.restart_elsewhere && !leave_it {
        world.dismiss_peer();
        world.ensure_start_refused(other)?;
        world.boot(other, &[&format!("--take-ownership={}", newest.epoch)])?
    } else {
        // Its host knows that its process is dead: nobody has to say so.
        world.boot(home, &[])?
    };
    if leave_it {
        let status =
            former.node.process.wait(END_LIMIT).context("the machine was started anew, and its old copy stays")?;
        ensure!(status.code() == Some(EXIT_LOST), "the machine was started anew, and its old copy ended with {status}");
    }
    world.watch.remove(former.id);
    world.dismiss_peer();
    Ok(())
}

/// Everybody goes, and the machine is started anew.
pub fn start_over(world: &mut World<'_>) -> Result<()> {
    world.dismiss_peer();
    world.owner.node.process.kill()?;
    let newest = claims::newest(&world.stores.claims())?;
    let former = world.boot(0, &[&format!("--take-ownership={}", newest.epoch)])?;
    world.watch.remove(former.id);
    Ok(())
}

/// Somebody starts the machine at the other host, while it runs here.
pub fn try_a_second_start(world: &mut World<'_>) -> Result<()> {
    world.ensure_start_refused(1 - world.owner.host).context("a second start of a running machine")
}
