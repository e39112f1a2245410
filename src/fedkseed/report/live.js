// Looks again every two seconds and puts what is new in the place of what is old; what a reader has unfolded stays so.
const live = document.getElementById("live");
let seen = null;

function put(fresh) {
  const open = new Set([...document.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent));
  for (const part of ["header", "main"]) {
    document.querySelector(part).replaceWith(fresh.querySelector(part));
  }
  for (const summary of document.querySelectorAll("summary")) {
    summary.parentElement.open = open.has(summary.textContent);
  }
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/", { cache: "no-store", headers: seen ? { "If-None-Match": seen } : {} });
      if (answer.status === 200) {
        put(new DOMParser().parseFromString(await answer.text(), "text/html"));
        seen = answer.headers.get("ETag");
      }
      live.textContent = answer.status < 400 ? "Live" : await answer.text();
      live.className = answer.status < 400 ? "status" : "status bad";
    } catch {
      live.textContent = "No longer live: fedkseed watch has ended. This is what was last seen.";
      live.className = "status bad";
    }
  }
  setTimeout(look, 2000);
}

look();
