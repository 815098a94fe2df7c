//! What one request costs the sidecar: instructions and allocations, as callgrind counts them, against `cost.txt`.
//!
//! ```text
//! cargo bench --bench cost                         fails where a cost is more than the one of the file, and tells of less
//! cargo bench --bench cost -- --write              writes the file
//! cargo bench --bench cost -- --profile h1         the functions that a request of this shape is spent in
//! cargo bench --bench cost -- --growth             how an intercepted request's cost grows, as a table
//! ```
//!
//! The real program runs under valgrind; agent, API and authorization server are here, outside of it. One worker, one
//! connection and one request at a time make the count nearly the same in every run, on a busy machine too. The cost
//! is the slope between a short and a long round of requests on warm connections, so that start and timers are not in
//! it. What the kernel does is not counted.

#[path = "cost/callgrind.rs"]
mod callgrind;
#[path = "cost/kept.rs"]
mod kept;
#[path = "cost/world.rs"]
mod world;

use std::process::ExitCode;

use self::callgrind::{Cost, Dump};
use self::kept::Kept;
use self::world::{Shape, World};

/// Requests of the rounds that are compared.
const SHORT: u64 = 100;
const LONG: u64 = 600;
/// Until connections, tokens and buffers are as they stay.
const WARM_UP: u64 = 50;
/// How many functions a profile shows.
const SHOWN: usize = 45;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` only wants to know that it builds.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).filter(|argument| *argument != "--bench").collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match arguments[..] {
        [] => runtime.block_on(compare()),
        ["--write"] => runtime.block_on(write()),
        ["--growth"] => runtime.block_on(growth()),
        ["--profile", name] if Shape::named(name).is_some() => runtime.block_on(profile(Shape::named(name).unwrap())),
        _ => {
            let shapes: Vec<_> = Shape::ALL.iter().map(|shape| shape.name()).collect();
            eprintln!("usage: cargo bench --bench cost -- [--write | --growth | --profile {}]", shapes.join("|"));
            ExitCode::from(2)
        }
    }
}

async fn compare() -> ExitCode {
    let kept = Kept::read();
    let comparable = kept.is_of_this_compiler();
    let differences: Vec<_> =
        measure().await.iter().filter_map(|(shape, cost)| kept.differs(shape.name(), *cost)).collect();
    for (difference, _) in &differences {
        eprintln!("{difference}");
    }
    if !differences.is_empty() {
        let hint = "`cargo bench --bench cost -- --write` writes the new numbers; commit them with what changed them";
        eprintln!("hint: {hint}");
    }
    ExitCode::from(u8::from(comparable && differences.iter().any(|(_, is_mistake)| *is_mistake)))
}

async fn write() -> ExitCode {
    let costs = measure().await;
    Kept::write(costs.iter().map(|(shape, cost)| (shape.name(), *cost)));
    ExitCode::SUCCESS
}

/// The cost of a request of each shape.
async fn measure() -> Vec<(Shape, Cost)> {
    let mut world = World::start(1).await;
    let mut costs = Vec::new();
    for shape in Shape::ALL {
        let (short, long) = rounds(&mut world, shape).await;
        let cost = long.cost().less(short.cost()).each(LONG - SHORT);
        println!("{:<12} {:>8} instructions {:>6.1} allocations", shape.name(), cost.instructions, cost.allocations);
        costs.push((shape, cost));
    }
    costs
}

async fn profile(shape: Shape) -> ExitCode {
    let mut world = World::start(1).await;
    let (short, long) = rounds(&mut world, shape).await;
    let (name, each) = (shape.name(), |count: i64| count as f64 / (LONG - SHORT) as f64);
    let mut functions = long.functions(&short);

    println!("\n{name}: instructions a request: by the function itself, and with what it calls");
    functions.sort_by_key(|(_, own, _)| -own);
    for (function, own, with_calls) in functions.iter().take(SHOWN) {
        println!("{:>10.0} {:>10.0}  {function}", each(*own), each(*with_calls));
    }
    println!("\n{name}: the same, sorted by what it calls");
    functions.sort_by_key(|(_, _, with_calls)| -with_calls);
    for (function, own, with_calls) in functions.iter().take(2 * SHOWN) {
        println!("{:>10.0} {:>10.0}  {function}", each(*own), each(*with_calls));
    }
    for (what, names) in [("memory", &["__rust_alloc", "__rust_realloc", "malloc"][..]), ("copies and wipes", &["mem"])]
    {
        println!("\n{name}: {what}: calls a request, instructions, caller -> called");
        let mut callers = long.callers(&short, names);
        callers.sort_by_key(|(_, _, count, cost)| -(count + cost));
        for (caller, called, count, cost) in callers.iter().take(SHOWN) {
            println!("{:>10.2} {:>10.0}  {caller} -> {called}", each(*count), each(*cost));
        }
    }
    ExitCode::SUCCESS
}

/// An intercepted HTTP/1 request among many routes, and by turns on many connections.
async fn growth() -> ExitCode {
    println!("| | instructions | allocations |\n|---|---|---|");
    for routes in [1, 100, 10_000] {
        row(&format!("{routes} routes"), &mut World::start(routes).await, 1).await;
    }
    let mut world = World::start(1).await;
    for connections in [1, 64, 1_024] {
        row(&format!("{connections} connections"), &mut world, connections).await;
    }
    ExitCode::SUCCESS
}

async fn row(name: &str, world: &mut World, connections: u64) {
    let mut agents = Vec::new();
    for _ in 0..connections {
        agents.push(world.agent(Shape::H1).await);
    }
    // As many rounds as make the requests of the other measurements; the first round is each connection's first request.
    let (each, mut dumps) = (SHORT.max(connections), Vec::new());
    for requests in [each, each, 2 * each] {
        for turn in 0..requests {
            agents[(turn % connections) as usize].ask(1).await;
        }
        dumps.push(world.sidecar.dump().await);
    }
    let cost = dumps[2].cost().less(dumps[1].cost()).each(each);
    println!("| {name:<16} | {} | {:.1} |", cost.instructions, cost.allocations);
}

async fn rounds(world: &mut World, shape: Shape) -> (Dump, Dump) {
    let mut agent = world.agent(shape).await;
    agent.ask(WARM_UP).await;
    world.sidecar.dump().await;
    agent.ask(SHORT).await;
    let short = world.sidecar.dump().await;
    agent.ask(LONG).await;
    (short, world.sidecar.dump().await)
}
